"""Prepares a dataset: which passes run in which order, and the manifest at the end."""

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc

from recsys.config import Config
from recsys.data.manifest import MANIFEST_NAME, Dataset, DatasetManifest
from recsys.errors import UserError
from recsys.ingest.append import append, appended_uri
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.identity import Inputs, choose_num_shards, content_config, dataset_uri, find_inputs, identify_inputs
from recsys.ingest.partitions import Job, WriteTask, core_round, merge_events, write_shards
from recsys.ingest.passes import (
    clear_leftovers,
    count_items,
    describe_input,
    nothing_left,
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
from recsys.ingest.ray_tasks import Outcome
from recsys.ingest.shuffle import write_table
from recsys.ingest.synthetic.events import generate
from recsys.ingest.write.catalogue import build_catalogue
from recsys.ingest.write.measuring import measure, write_dataset_report
from recsys.ingest.write.statistics import item_numbers, join_moments
from recsys.schema import TIE_RULE, FeatureKind, derive_tasks, order_event_kinds
from recsys.store import Storage, join

logger = logging.getLogger(__name__)
_MAX_EVENT_KINDS = 127


def find_dataset(config: Config, storage: Storage) -> Dataset | None:
    """Open the dataset that this input and config make, if it has been made; what a killed run left in it goes."""
    uri = appended_uri(config, storage) if config.data.base else dataset_uri(config, storage)
    if not storage.exists(join(uri, MANIFEST_NAME)):
        return None
    clear_leftovers(storage, uri)
    return Dataset.open(storage, uri)


def prepare(config: Config, storage: Storage) -> Dataset:
    """Make the dataset of `config.data`, or open it where it has been made; call it with Ray initialised.

    Its address follows from the input files, the config and the format version. The manifest comes last and once, so
    a dataset is there whole or not at all. A run that was killed is simply run again and continues with the tasks that
    were not finished. This process holds what grows with the number of items, and counts; events and users stay with
    the tasks, each of which holds one partition.

    Raises:
        UserError: an input is missing, unreadable or leaves nothing to train on.
    """
    made = find_dataset(config, storage)
    if made is not None:
        logger.info("dataset %s is there already", made.uri)
        return made
    if config.data.base:
        return append(config, storage)
    data = generate(config.data, storage) if config.data.source == "synthetic" else config.data
    inputs = find_inputs(data, storage)
    data = data.model_copy(update={"num_shards": data.num_shards or choose_num_shards(storage, inputs.events, data)})
    job = Job(storage, dataset_uri(config, storage), data, inputs.time_column, inputs.time_unit or "s")
    return publish(job, _run_passes(job, inputs, config))


@dataclass(frozen=True)
class _Events:
    """What the passes before the shards know of the events: the staged generation, its partitions, and the outcomes of all passes."""

    generation: int
    partitions: list[Outcome]
    outcomes: list[Outcome]

    @property
    def rejects(self) -> Rejects:
        """What all passes dropped."""
        return Rejects.of_outcomes(self.outcomes)


def _run_passes(job: Job, inputs: Inputs, config: Config) -> DatasetManifest:
    items = read_items(job, inputs.items)
    events = _merge(job, inputs)
    if job.data.k_core:
        events = _filter_core(job, events)
    refuse_empty(job, inputs, events.partitions, events.rejects)
    event_kinds = _order_kinds(job, events.partitions)
    ids, odd_items, warnings = number_items(job, events.generation, items.rows)
    users = stage_inputs(job, "users", inputs.users)
    shards = _write_all(job, events, event_kinds)
    num_values, value_mean, value_std = join_moments([outcome["values"] for outcome in shards])
    if not any(outcome["train"] for outcome in shards):
        raise nothing_left(job, inputs, "no user has two training interactions, so there is nothing to train on", events.rejects)
    taken_out = sum_counts(shards, "rejected")
    measured = measure(job, shards, len(event_kinds), len(ids))
    numbers = item_numbers(measured.items) if job.data.item_features.statistics else None
    catalogue = build_catalogue(ids, items.rows, items.kinds, train_counts(job, len(ids)), numbers)
    described = describe_input(job, inputs, items, warnings, events.outcomes, users, shards)
    manifest = sign(
        inputs=identify_inputs(config.data, job.storage),
        data_config={**content_config(job.data), "item_features": _resolve_features(job, items.kinds)},
        tie_rule=TIE_RULE,
        num_users=sum(outcome["num_users"] for outcome in events.partitions),
        num_items=len(ids),
        num_interactions=sum(outcome["rows"] for outcome in events.partitions) - taken_out.total(),
        num_targets=sum(outcome["num_targets"] for outcome in shards),
        num_queries=sum(outcome["num_queries"] for outcome in events.partitions),
        rejected=present(events.rejects + taken_out + items.rejects + rejects_of_users(users, shards)),
        noticed=present(sum_counts(events.outcomes, "noticed") + catalogue.noticed + odd_items),
        **described,
        items_without_catalogue_entry=odd_items["unknown_item"],
        event_kinds=event_kinds,
        tasks=derive_tasks(event_kinds, num_values, job.data.like_threshold),
        value_mean=value_mean,
        value_std=value_std,
        has_time=job.has_time,
        num_streams=job.data.num_streams,
        category_vocabulary=catalogue.category_vocabulary,
        number_columns=catalogue.number_columns,
        number_moments=catalogue.number_moments,
        vector_size=catalogue.vector_size,
        train_shards=[outcome["train"] for outcome in shards if outcome["train"]],
        users_shards=[outcome["users"] for outcome in shards if outcome["users"]],
        catalogue_shards=write_shards_of(job, "catalogue", catalogue.table),
        user_statistics_shards=measured.user_shards,
        item_statistics_shards=measured.item_shards,
        query_shards=[outcome["queries"] for outcome in shards if outcome["queries"]],
    )
    write_dataset_report(job, manifest, measured)
    return manifest


def _merge(job: Job, inputs: Inputs) -> _Events:
    """Clean the events and gather them by partition of their users."""
    staged = stage_inputs(job, "events", inputs.events)
    if not any(outcome["rows"] for outcome in staged):
        raise UserError(f"data.events = {job.data.events}: has no rows")
    merged = run_pass(job, "partitions", partial(merge_events, job), range(job.num_partitions))
    return _Events(0, merged, [*staged, *merged])


def _filter_core(job: Job, events: _Events) -> _Events:
    """Drop users and items with fewer than k_core interactions until none is left."""
    generation, outcomes = events.generation, events.outcomes
    while True:
        counts = count_items(job, generation)
        generation += 1
        survivors = counts.filter(pc.greater_equal(counts["count_sum"], job.data.k_core))
        write_table(job.storage, job.staged("survivors", generation, 0), survivors)
        partitions = run_pass(job, f"k-core round {generation}", partial(core_round, job, generation), range(job.num_partitions))
        outcomes = [*outcomes, *partitions]
        if not sum_counts(partitions, "rejected").total():
            return _Events(generation, partitions, outcomes)


def _order_kinds(job: Job, partitions: list[Outcome]) -> tuple[str, ...]:
    event_kinds = order_event_kinds({kind for outcome in partitions for kind in outcome["event_kinds"]}, job.data.event_kinds)
    if len(event_kinds) > _MAX_EVENT_KINDS:
        raise UserError(
            f"data.columns.event = '{job.data.columns.event}': has {len(event_kinds)} kinds; at most {_MAX_EVENT_KINDS} are possible"
        )
    return event_kinds


def _write_all(job: Job, events: _Events, event_kinds: tuple[str, ...]) -> list[Outcome]:
    first_users = np.cumsum([0, *(outcome["num_users"] for outcome in events.partitions)]).tolist()
    first_queries = np.cumsum([1, *(outcome["num_queries"] for outcome in events.partitions)]).tolist()
    firsts = zip(first_users[:-1], first_queries[:-1], strict=True)
    tasks = [WriteTask(number, events.generation, *first, event_kinds) for number, first in enumerate(firsts)]
    return run_pass(job, "shards", partial(write_shards, job), tasks)


def _resolve_features(job: Job, kinds: dict[str, FeatureKind]) -> dict[str, object]:
    """Name the features with the kinds that they were found to have, which an appended version must keep."""
    features = job.data.item_features.model_dump(mode="json")
    return features | {kind: [name for name, own in kinds.items() if own == kind] for kind in ("text", "categories", "numbers", "vectors")}
