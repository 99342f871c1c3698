"""Prepares a dataset or its next version: the order of the passes, and the manifest at the end."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from recsys.arrays import Integers
from recsys.config import Config
from recsys.config.data import DataConfig
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace
from recsys.data.manifest import MANIFEST_NAME, ColumnUse, Dataset, DatasetManifest, content_fingerprint
from recsys.errors import UserError
from recsys.ingest.append import KNOWN_INDEX_NAME, changed_items, extend, open_base, refuse_other_input, with_base_settings
from recsys.ingest.clean.id_overlap import Overlap
from recsys.ingest.clean.rejects import Rejects, remedy, tell
from recsys.ingest.clean.times import UNIT_NAMES
from recsys.ingest.input_tasks import stage_events, stage_users
from recsys.ingest.inputs import Inputs, choose_num_shards, content_config, dataset_uri, find_inputs, identify_inputs
from recsys.ingest.job import Cleaned, Job, Partition, Written, present
from recsys.ingest.partition_tasks import (
    IS_WITHHELD,
    ITEM_INDEX_NAME,
    WriteTask,
    core_round,
    merge_events,
    write_shards,
)
from recsys.ingest.shuffle import read_table, write_table
from recsys.ingest.situations import context_space, profile_space, refuse_unknown_sensitive
from recsys.ingest.sources import input_files
from recsys.ingest.sources.sandbox import run_limited
from recsys.ingest.synthetic.events import generate
from recsys.ingest.write.catalogue import Catalogue, build_catalogue, clean_items, sort_ids
from recsys.ingest.write.event_kinds import choose_kinds
from recsys.ingest.write.exposures import role_of_exposures
from recsys.ingest.write.feature_statistics import item_numbers, join_moments, taken_moments
from recsys.ingest.write.splits import withheld
from recsys.ingest.write.statistics_passes import measure, write_dataset_report
from recsys.schema import COUNTS_SCHEMA, ITEM_ID, TIE_RULE, FeatureKind, Kind, derive_tasks, event_tasks
from recsys.store import ObjectInfo, Storage, join
from recsys.store.backends import TEMP_PREFIX

logger = logging.getLogger(__name__)


def find_dataset(config: Config, storage: Storage) -> Dataset | None:
    """Open the dataset of this input and config if it exists, and delete what a killed run left in its folder."""
    _, _, uri = _resolve(config, storage)
    if not storage.exists(join(uri, MANIFEST_NAME)):
        return None
    _clear_leftovers(storage, uri)
    return Dataset.open(storage, uri)


def _resolve(config: Config, storage: Storage) -> tuple[DataConfig, Dataset | None, str]:
    """Return the config with the base's settings, the base if there is one, and the dataset's address."""
    if not config.data.base:
        return config.data, None, dataset_uri(config.data, storage)
    base = open_base(config, storage)
    data = with_base_settings(config, base).data
    return data, base, dataset_uri(data, storage, base.manifest.fingerprint)


def prepare(config: Config, storage: Storage) -> Dataset:
    """Make the dataset of `config.data`, or open it if it exists; Ray must be initialized.

    With `data.base` this makes that dataset's next version. The address follows from the input files, the config and the format
    version. The manifest is a create-once write at the end, so a dataset is complete or absent. To resume a killed run, run it again:
    finished tasks are not repeated. This process holds counts and what grows with the number of items. Events and users stay in the
    tasks, each of which holds one partition.

    Raises:
        UserError: an input is missing or unreadable, nothing is left to train on, or the request contradicts the base.
    """
    made = find_dataset(config, storage)
    if made is not None:
        logger.info("dataset %s already exists", made.uri)
        return made
    given, base, uri = _resolve(config, storage)
    data = generate(given, storage) if given.source == "synthetic" and base is None else given
    inputs = find_inputs(data, storage)
    if base is not None:
        refuse_other_input(base, data, inputs)
    data = data.model_copy(update={"num_shards": data.num_shards or choose_num_shards(storage, inputs.events, data)})
    job = Job(storage, uri, data, inputs.time_column, inputs.time_unit or "s", base, inputs.optional)
    manifest = _run_passes(job, inputs, given)
    storage.create(join(uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    _clear_leftovers(storage, uri)
    _log_outcome(manifest)
    return Dataset.open(storage, uri)


@dataclass(frozen=True)
class _Events:
    """Results of the passes before the shards: the staged generation, its partitions, and the outcomes of all passes."""

    generation: int
    partitions: list[Partition]
    outcomes: list[Cleaned]

    @property
    def rejects(self) -> Rejects:
        return Rejects.of_outcomes(self.outcomes)


@dataclass(frozen=True)
class _Items:
    """The item table in memory, if there is one: its rows, the kinds of its features, its rejected rows, and the uses of its columns."""

    rows: pa.Table | None
    kinds: dict[str, FeatureKind]
    rejects: Rejects
    uses: tuple[ColumnUse, ...] = ()


def _run_passes(job: Job, inputs: Inputs, given: DataConfig) -> DatasetManifest:
    """Run the passes and write the report; `given` is the config before synthetic tables and the number of partitions are filled in."""
    items = _read_items(job, inputs.items)
    known_ids = _stage_known_items(job)
    events = _merge(job, inputs)
    if job.data.k_core and job.base is None:  # new users and items below it may still become active
        events = _filter_core(job, events)
    if not any(outcome.rows for outcome in events.partitions):
        raise _nothing_left(job, inputs, "no interaction is left", events.rejects)
    kinds, unknown_kinds = choose_kinds({kind for outcome in events.partitions for kind in outcome.event_kinds}, job.data, job.base)
    ids, odd_items, warnings = _number_items(job, events.generation, items.rows, known_ids)
    users = _stage_inputs(job, "users", inputs.users)
    refuse_unknown_sensitive(job, [*(use for outcome in (*events.outcomes, *users) for use in outcome.uses), *items.uses])
    profiles, contexts = profile_space(job, users), context_space(job, events.partitions)
    shards = _write_all(job, events, kinds, profiles, contexts)
    if job.base is None and not any(outcome.train for outcome in shards):
        raise _nothing_left(job, inputs, "no user has two training interactions, so there is nothing to train on", events.rejects)
    measured = measure(job, shards, len(kinds), len(ids), role_of_exposures(kinds, job.data) in ("label", "exposure"))
    counts = _train_counts(job, len(ids))
    if job.base is not None:
        catalogue = changed_items(job.base, ids, items.rows, items.kinds)
        made_by = job.base.manifest.data_config | content_config(job.data)
        fields: dict[str, Any] = {"data_config": made_by, "count_shards": job.write_shards("counts", _count_table(counts))}
    else:
        numbers = item_numbers(measured.items) if job.data.item_features.statistics else None
        catalogue = build_catalogue(ids, items.rows, items.kinds, counts, numbers)
        fields = _decide(job, items.kinds, kinds, catalogue, shards, measured.counts["kinds"])
    fields |= {
        "inputs": identify_inputs(given, job.storage),
        "num_items": len(ids),
        **_count(job, events, shards),
        **_describe_input(inputs, items, events, users, shards, [*unknown_kinds, *warnings]),
        "noticed": _occurring(sum((outcome.noticed for outcome in events.outcomes), catalogue.noticed + odd_items)),
        "items_without_catalogue_entry": odd_items["unknown_item"] + _before(job, "items_without_catalogue_entry"),
        "category_vocabulary": catalogue.category_vocabulary,
        "train_shards": present(outcome.train for outcome in shards),
        "users_shards": present(outcome.users for outcome in shards),
        "catalogue_shards": job.write_shards("catalogue", catalogue.table),
        "user_statistics_shards": measured.user_shards,
        "item_statistics_shards": measured.item_shards,
        "query_shards": present(outcome.queries for outcome in shards),
        "listed_shards": present(outcome.listed for outcome in shards),
        "profiles": profiles,
        "contexts": contexts,
    }
    manifest = _sign(extend(job.base, fields) if job.base is not None else fields)
    write_dataset_report(job, manifest, measured)
    return manifest


def _decide(
    job: Job, columns: dict[str, FeatureKind], kinds: tuple[Kind, ...], catalogue: Catalogue, shards: Sequence[Written], counts: Integers
) -> dict[str, Any]:
    """Return the manifest fields that the first version fixes for all versions appended to it."""
    num_values, value_mean, value_std = join_moments([outcome.value_moments for outcome in shards])
    role = role_of_exposures(kinds, job.data)
    if role and not num_values:
        value_mean, value_std = taken_moments(kinds, counts, bool(job.data.columns.labels))
    features = job.data.item_features.model_dump(mode="json")
    for kind in ("text", "categories", "numbers", "vectors"):
        features[kind] = [name for name, own in columns.items() if own == kind]
    return {
        "data_config": content_config(job.data) | {"item_features": features},
        "tie_rule": TIE_RULE,
        "event_kinds": tuple(kind.name for kind in kinds),
        "kinds": kinds if any(kind != Kind(kind.name) for kind in kinds) else (),
        "tasks": derive_tasks(kinds, num_values, job.data.like_threshold, bool(role)),
        "value_mean": value_mean,
        "value_std": value_std,
        "exposure_tasks": event_tasks(kinds) if role else (),
        "only_exposures_have_labels": role in ("label", "exposure"),
        "has_time": job.has_time,
        "num_streams": job.data.num_streams,
        "number_columns": catalogue.number_columns,
        "number_moments": catalogue.number_moments,
        "vector_size": catalogue.vector_size,
    }


def _before(job: Job, total: str) -> int:
    """Return a total of the base's manifest, or 0 without a base."""
    return 0 if job.base is None else int(getattr(job.base.manifest, total))


def _count(job: Job, events: _Events, shards: Sequence[Written]) -> dict[str, int]:
    """Return the totals over all versions."""
    new = {
        "num_users": sum(outcome.num_users for outcome in events.partitions),
        "num_interactions": sum(outcome.num_interactions - outcome.withheld for outcome in shards),
        "num_targets": sum(outcome.num_targets for outcome in shards),
        "num_exposures": sum(outcome.num_exposures for outcome in shards),
        "num_queries": sum(outcome.num_queries for outcome in events.partitions),
    }
    return {name: number + _before(job, name) for name, number in new.items()}


def _describe_input(
    inputs: Inputs, items: _Items, events: _Events, users: Sequence[Cleaned], shards: Sequence[Written], warnings: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest fields about the input: rejected rows with examples, each column's use, warnings, the time unit."""
    of_users = Rejects.of_outcomes([*users, *shards])
    withheld_rows = Counter(withheld=sum(outcome.withheld for outcome in shards))
    overlap = Overlap.join(outcome.overlap for outcome in shards)
    uses = [use for outcome in (*events.outcomes, *users) for use in outcome.uses]
    return {
        "rejected": _occurring(events.rejects + withheld_rows + items.rejects + of_users),
        "rejected_examples": events.rejects.named(inputs.events) | items.rejects.named(inputs.items) | of_users.named(inputs.users),
        "columns": tuple(dict.fromkeys([*uses, *items.uses])),
        "warnings": (*warnings, *(overlap.warnings("users", "data.columns.user_id", takes_unused=False) if inputs.users else ())),
        "time_unit": inputs.time_unit,
    }


def _read_items(job: Job, files: list[ObjectInfo]) -> _Items:
    if not files:
        return _Items(None, {}, Rejects())
    items = input_files.read_items(job.storage, files, job.data)
    rows, rejects = clean_items(items.rows, job.data.cleaning.reject_negative_ids)
    features = ", ".join(f"{name} ({kind})" for name, kind in items.kinds.items())
    logger.info("items: %d rows; features: %s", rows.num_rows, features or "none")
    return _Items(rows, items.kinds, rejects, items.uses)


def _stage_known_items(job: Job) -> list[str]:
    """Stage the index of the base's items and return their ids in its order; empty without a base."""
    if job.base is None:
        return []
    ids = job.base.catalogue_rows[ITEM_ID]
    write_table(job.storage, job.staging(KNOWN_INDEX_NAME), pa.table({ITEM_ID: ids}))
    return ids.to_pylist()


def _stage_inputs(job: Job, label: str, files: Sequence[ObjectInfo]) -> list[Cleaned]:
    """Write the pieces of one table, `events` or `users`."""
    function = stage_events if label == "events" else stage_users
    tasks = list(enumerate(input_files.plan_tasks(job.storage, files, job.data))) if files else []

    def stage(task: Any) -> Cleaned:
        # The memory-limited child reads and writes: file contents never enter this process or a worker.
        return Cleaned.model_validate(run_limited(job.data.max_file_memory_bytes, function, job, *task))

    return job.run(label, Cleaned, stage, tasks)


def _merge(job: Job, inputs: Inputs) -> _Events:
    """Clean the events and gather them by user partition."""
    staged = _stage_inputs(job, "events", inputs.events)
    if not any(outcome.rows for outcome in staged):
        raise UserError(f"data.events = {job.data.events}: has no rows")
    merged = job.run("partitions", Partition, partial(merge_events, job), range(job.num_partitions))
    return _Events(0, merged, [*staged, *merged])


def _filter_core(job: Job, events: _Events) -> _Events:
    """Drop users and items with fewer than k_core interactions, round by round, until a round drops nothing."""
    generation, outcomes = events.generation, events.outcomes
    while True:
        counts = _count_items(job, generation)
        generation += 1
        survivors = counts.filter(pc.greater_equal(counts["count_sum"], job.data.k_core))
        write_table(job.storage, job.staged("survivors", generation, 0), survivors)
        task = partial(core_round, job, generation)
        partitions = job.run(f"k-core round {generation}", Partition, task, range(job.num_partitions))
        outcomes = [*outcomes, *partitions]
        if not any(outcome.rejected for outcome in partitions):
            return _Events(generation, partitions, outcomes)


def _count_items(job: Job, generation: int) -> pa.Table:
    """Add up how often each item occurs (columns `item_id`, `count_sum`), partition by partition."""
    total = _sum_items([])
    for partition in range(job.num_partitions):
        total = _sum_items([total.rename_columns([ITEM_ID, "count"]), read_table(job.storage, job.staged("items", generation, partition))])
    return total


def _sum_items(tables: list[pa.Table]) -> pa.Table:
    nothing = pa.table({ITEM_ID: pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    return pa.concat_tables([nothing, *tables]).group_by(ITEM_ID, use_threads=False).aggregate([("count", "sum")])


def _number_items(job: Job, generation: int, items: pa.Table | None, known: Sequence[str]) -> tuple[pa.Array, Counter[str], list[str]]:
    """Number the items: the `known` first, then new ones of the catalogue and the events in natural order.

    Under k_core only items that remain in the events are numbered. Also returns counts of oddities among the new items, and warnings
    if events and catalogue have few items in common.
    """
    seen = set(_count_items(job, generation)[ITEM_ID].to_pylist())
    listed = set(items[ITEM_ID].to_pylist()) if items is not None else set()
    new = (seen if job.data.k_core else seen | listed).difference(known)
    ids = pa.array([*known, *sort_ids(list(new))], pa.string())
    is_withheld = withheld(ids, job.data)
    write_table(job.storage, job.staging(ITEM_INDEX_NAME), pa.table({ITEM_ID: ids, IS_WITHHELD: is_withheld}))
    num_unknown = len((seen - listed).difference(known)) if items is not None else 0
    noticed = Counter(unknown_item=num_unknown, withheld_item=int(is_withheld[len(known) :].sum()))
    if items is None:
        return ids, noticed, []
    both = Overlap.of(*(pa.array(sort_ids(list(side)), pa.string()) for side in (seen.difference(known), listed)))
    takes_unused = not known and not job.data.k_core
    return ids, noticed, both.warnings("items", "data.columns.item_id", takes_unused)


def _write_all(job: Job, events: _Events, kinds: tuple[Kind, ...], profiles: ProfileSpace, contexts: ContextSpace) -> list[Written]:
    first_user, first_query = (job.base.manifest.num_users, job.base.manifest.num_queries + 1) if job.base is not None else (0, 1)
    tasks = []
    for number, outcome in enumerate(events.partitions):
        tasks.append(WriteTask(number, events.generation, first_user, first_query, kinds, profiles, contexts))
        first_user, first_query = first_user + outcome.num_users, first_query + outcome.num_queries
    return job.run("shards", Written, partial(write_shards, job), tasks)


def _train_counts(job: Job, num_items: int) -> Integers:
    """Add up the staged training counts of each item over all partitions."""
    counts = np.zeros(num_items, np.int64)
    for partition in range(job.num_partitions):
        staged = read_table(job.storage, job.staged("train-counts", 0, partition))
        counts[staged["item_index"].to_numpy() - 1] += staged["count"].to_numpy()
    return counts


def _count_table(counts: Integers) -> pa.Table:
    found = np.flatnonzero(counts)
    return pa.table([pa.array(found + 1, pa.int32()), pa.array(counts[found], pa.int64())], schema=COUNTS_SCHEMA)


def _occurring(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def _sign(fields: dict[str, Any]) -> DatasetManifest:
    """Build a manifest with its fingerprint."""
    unsigned = DatasetManifest(fingerprint="", **fields)
    return unsigned.model_copy(update={"fingerprint": content_fingerprint(unsigned.model_dump(mode="json"))})


def _clear_leftovers(storage: Storage, uri: str) -> None:
    """Delete the staging folder of a published dataset, and partial files that killed writers left in its folder."""
    storage.delete_tree(join(uri, "staging"))
    filesystem, path = storage.locate(uri)
    for found in filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
        if found.base_name.startswith(TEMP_PREFIX):
            filesystem.delete_file(found.path)


def _log_outcome(manifest: DatasetManifest) -> None:
    """Log a dataset's size, rejected rows, unused columns and warnings."""
    logger.info(
        "%d users, %d items, %d interactions; rejected: %s; noticed: %s; items without a catalogue entry: %d; %s",
        manifest.num_users,
        manifest.num_items,
        manifest.num_interactions,
        manifest.rejected or "none",
        manifest.noticed or "none",
        manifest.items_without_catalogue_entry,
        manifest.tie_rule,
    )
    if manifest.time_unit:
        logger.info("times: numbers are read as %s (data.time_unit)", UNIT_NAMES[manifest.time_unit])
    for rule, count in manifest.rejected.items():
        logger.info("rejected %s", tell(rule, count, manifest.rejected_examples.get(rule, ())))
    unused = [f"{use.table}.{use.name} ({use.type}: {use.reason})" for use in manifest.columns if not use.use]
    if unused:
        logger.warning("columns that are not used: %s", ", ".join(unused))
    for warning in manifest.warnings:
        logger.warning("%s", warning)


def _nothing_left(job: Job, inputs: Inputs, what: str, rejects: Rejects) -> UserError:
    """Return the error for too few events left; it lists the rejected rows and the setting that would accept them."""
    examples = rejects.named(inputs.events)
    found = ". ".join(tell(rule, count, examples.get(rule, ())) for rule, count in sorted(rejects.items()) if count)
    where = job.data.events or job.data.folder
    return UserError(f"data.events = {where}: {what}; rejected {found or 'nothing'}{remedy(rejects)}")
