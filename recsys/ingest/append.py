"""Appends events to a dataset as its next version: rules, refusals, and the order of the passes.

A version is a dataset of its own whose manifest lists the older versions' shards before its own; nothing of those is touched, and a
run that trains on an older version is not affected. Versions form a tree: any version may be appended to, any number of times.

- How a dataset is made stays what it was: partitions, split, windows and cleaning are the base's, and a key that asks for something
  else is refused by name. Input column names and units may differ, since a day's files may. `data.k_core` is not applied to a day:
  users and items that it would drop may yet become active.
- Users and items keep their indices; new users are numbered after them, new items too, in natural order. Event kinds, tasks, moments of
  values and numbers, and the category vocabulary are the base's, the latter extended at its end, so that old shards and old
  checkpoints mean what they meant. A new kind of event is refused.
- A user's history continues with the day's events in their own time order, also with those that are older than what is known, which
  are counted as "late". An event that agrees with a known one in user, item, time and kind is a duplicate.
- The split rule is applied to the whole sequence. Of it, only the day's interactions that fall into its training part become targets,
  with up to `data.max_history` older ones before them as context. What was held out before and now has newer interactions behind it is
  context and never a target, so that over all versions an interaction is a target at most once. What was trained on stays training
  data: under leave_one_out a user whose two interactions were trained on and who then gets a third has that one for testing alone.
  Under the random split every interaction stays in the part that it was drawn for.
- The same items are withheld, and new ones by the same draw. What falls into the training part is taken out, also where it was held out
  before; so is a late interaction with such an item, since it may be one that was taken out of an older version. The rule of
  leave_one_out counts what the rows have: a user who had two interactions, one of them taken out, has one.
- The users shards of the day have the whole rows of its active users alone, with new attributes where the day's users table has them.
  The catalogue shards have new and changed items alone. `rejected` and `noticed` count the day.
- Statistics and the report are those of the whole version; statistics among the catalogue's numbers stay what they were.
"""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.config import Config
from recsys.config.base import Fact
from recsys.config.data import DataConfig
from recsys.config.verb_settings import facts_of, refuse_contradictions
from recsys.data.manifest import Dataset, DatasetManifest, Shard
from recsys.errors import UserError
from recsys.ingest.append_catalogue import changed_items
from recsys.ingest.append_tasks import KNOWN_INDEX_NAME, AppendTask, append_shards, merge_day
from recsys.ingest.clean.pseudonyms import refuse_other_key
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.identity import content_config, dataset_uri, find_inputs, identify_inputs
from recsys.ingest.partitions import Job
from recsys.ingest.passes import (
    describe_input,
    number_items,
    present,
    publish,
    read_items,
    refuse_empty,
    rejects_of_users,
    run_pass,
    sign,
    stage_inputs,
    sum_counts,
    train_counts,
    write_shards_of,
)
from recsys.ingest.shuffle import write_table
from recsys.ingest.write.measuring import measure_version, write_report
from recsys.schema import COUNTS_SCHEMA, ITEM_ID, POSITION, TIMESTAMP
from recsys.store import Storage


def appended_uri(config: Config, storage: Storage) -> str:
    """Derive the address of the version that `config.data` appends to `data.base`."""
    base = _open_base(config, storage)
    return dataset_uri(_adopt(config, base), storage, base.manifest.fingerprint)


def append(config: Config, storage: Storage) -> Dataset:
    """Make the version that has the events of `config.data` after those of `data.base`; call it with Ray initialised.

    Raises:
        UserError: an input is missing or unreadable, or the base does not allow what is asked for.
    """
    base = _open_base(config, storage)
    config = _adopt(config, base)
    refuse_other_key(config.data.pseudonym_key_env, base.manifest.inputs)
    inputs = find_inputs(config.data, storage)
    expected = TIMESTAMP if base.manifest.has_time else POSITION
    if inputs.time_column != expected:
        raise UserError(f"{inputs.events[0].uri}: orders events by {inputs.time_column}; the base dataset does by {expected}")
    job = Job(storage, dataset_uri(config, storage, base.manifest.fingerprint), config.data, inputs.time_column, inputs.time_unit or "s")
    items = read_items(job, inputs.items)
    known_ids = base.catalogue_rows[ITEM_ID].to_pylist()
    write_table(job.storage, job.staging(KNOWN_INDEX_NAME), pa.table({ITEM_ID: pa.array(known_ids, pa.string())}))
    staged = stage_inputs(job, "events", inputs.events)
    merged = run_pass(job, "partitions", partial(merge_day, job, base), range(job.num_partitions))
    outcomes = [*staged, *merged]
    rejects, noticed = Rejects.of_outcomes(outcomes), sum_counts(outcomes, "noticed")
    refuse_empty(job, inputs, merged, rejects)
    _refuse_new_kinds(job, base, merged)
    ids, odd_items, warnings = number_items(job, 0, items.rows, known_ids)
    users = stage_inputs(job, "users", inputs.users)
    first_users = base.manifest.num_users + np.cumsum([0, *(outcome["num_users"] for outcome in merged)])
    first_queries = 1 + base.manifest.num_queries + np.cumsum([0, *(outcome["num_queries"] for outcome in merged)])
    firsts = zip(first_users[:-1].tolist(), first_queries[:-1].tolist(), strict=True)
    tasks = [AppendTask(partition, *first) for partition, first in enumerate(firsts)]
    shards = run_pass(job, "shards", partial(append_shards, job, base), tasks)
    catalogue = changed_items(base, ids, items.rows, items.kinds)
    described = describe_input(job, inputs, items, warnings, outcomes, users, shards)
    noticed += catalogue.noticed + odd_items
    taken_out = sum_counts(shards, "rejected")
    measured = measure_version(job, base, shards, len(ids))
    manifest = _extend(
        base,
        inputs=identify_inputs(config.data, storage),
        data_config={**base.manifest.data_config, **content_config(config.data)},
        num_users=int(first_users[-1]),
        num_items=len(ids),
        num_interactions=base.manifest.num_interactions + sum(outcome["rows"] for outcome in merged) - taken_out.total(),
        num_targets=base.manifest.num_targets + sum(outcome["num_targets"] for outcome in shards),
        num_queries=int(first_queries[-1]) - 1,
        rejected=present(rejects + taken_out + items.rejects + rejects_of_users(users, shards)),
        noticed=present(noticed),
        **described,
        items_without_catalogue_entry=base.manifest.items_without_catalogue_entry + odd_items["unknown_item"],
        category_vocabulary=catalogue.category_vocabulary,
        train_shards=[outcome["train"] for outcome in shards if outcome["train"]],
        users_shards=[outcome["users"] for outcome in shards if outcome["users"]],
        catalogue_shards=write_shards_of(job, "catalogue", catalogue.table),
        count_shards=write_shards_of(job, "counts", _added_counts(job, len(ids))),
        user_statistics_shards=measured.user_shards,
        item_statistics_shards=measured.item_shards,
        query_shards=[outcome["queries"] for outcome in shards if outcome["queries"]],
    )
    write_report(job, manifest, measured)
    return publish(job, manifest)


def _extend(base: Dataset, **changed: Any) -> DatasetManifest:
    """Build the manifest of the version after `base`: its fields with some changed, its lists of shards with more behind."""
    fields = base.manifest.model_dump(exclude={"fingerprint"}) | {"version": base.manifest.version + 1, "base": base.name}
    for name, value in fields.items():
        if name.endswith("_shards"):
            inherited = [{**shard, "dataset": shard["dataset"] or base.name} for shard in value]
            changed[name] = [Shard.model_validate(shard) for shard in (*inherited, *changed.get(name, ()))]
    return sign(**fields | changed)


def _added_counts(job: Job, num_items: int) -> pa.Table:
    counts = train_counts(job, num_items)
    found = np.flatnonzero(counts)
    return pa.table([pa.array(found + 1, pa.int32()), pa.array(counts[found], pa.int64())], schema=COUNTS_SCHEMA)


def _open_base(config: Config, storage: Storage) -> Dataset:
    base = Dataset.open(storage, config.data.base, "data.base")
    folder = storage.uri("datasets")
    if base.uri.rpartition("/")[0] != folder:
        raise UserError(f"data.base = {base.uri}: versions lie beside one another; it must be a dataset in {folder}")
    return base


def _adopt(config: Config, base: Dataset) -> Config:
    """Take over how the base was made.

    Raises:
        UserError: a key is given that says otherwise.
    """
    made_by = content_config(DataConfig()) | base.manifest.data_config  # an old base was made before there was every key
    refuse_contradictions(config, {"data": made_by}, "the base dataset", "a version keeps that; prepare a new dataset from all events")
    adopted = {key: value for key, value in made_by.items() if Fact.INPUT not in facts_of(f"data.{key}")}
    if not any(key.startswith("data.columns.") for key in config.given):
        adopted["columns"] = made_by["columns"]
    return config.with_values({f"data.{key}": value for key, value in adopted.items()})


def _refuse_new_kinds(job: Job, base: Dataset, merged: list[dict[str, Any]]) -> None:
    known = base.manifest.event_kinds
    new = sorted({kind for outcome in merged for kind in outcome["event_kinds"]}.difference(known))
    if new:
        raise UserError(
            f"data.events = {job.data.events}: has the event kind '{new[0]}', which the base dataset has not; "
            f"it has {', '.join(known)}; prepare a new dataset from all events"
        )
