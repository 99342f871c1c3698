"""Raw tables to a Dataset: which passes run in which order, and the manifest at the end; a pass's work is in `partitions.py`."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import Config, DataConfig
from recsys.data.catalogue import Catalogue, build_catalogue, clean_items, sort_ids
from recsys.data.formats import plan_parts
from recsys.data.importers import find_event_columns, find_files, find_in_folder, import_items
from recsys.data.manifest import MANIFEST_NAME, Dataset, DatasetManifest, content_fingerprint
from recsys.data.partitions import (
    ITEM_INDEX_NAME,
    Job,
    WriteTask,
    core_round,
    merge_events,
    stage_events,
    stage_users,
    write_shard,
    write_shards,
)
from recsys.data.ray_tasks import run_tasks
from recsys.data.shuffle import read_table, write_table
from recsys.data.synthetic import GENERATOR_VERSION, generate
from recsys.errors import UserError
from recsys.schema import ITEM_ID, TIE_RULE, TIMESTAMP, FeatureKind, derive_tasks, order_event_kinds
from recsys.storage import ObjectInfo, Storage, join

logger = logging.getLogger(__name__)
FORMAT_VERSION = 2
_MAX_EVENT_KINDS = 127
_CATALOGUE_SHARD_ROWS = 1_000_000
Outcome = dict[str, Any]


def find_dataset(config: Config, storage: Storage) -> Dataset | None:
    """Open the dataset that this input and config make, if it has been made."""
    uri = _dataset_uri(config, storage)
    return Dataset.open(storage, uri) if storage.exists(join(uri, MANIFEST_NAME)) else None


def prepare(config: Config, storage: Storage) -> Dataset:
    """Make the dataset of `config.data`, or open it where it has been made; call it with Ray initialised.

    Its address follows from the input files, the config and the format version. The manifest comes last and once, so
    a dataset is there whole or not at all, and a run that was killed is simply run again.

    Raises:
        UserError: an input is missing, unreadable or leaves nothing to train on.
    """
    made = find_dataset(config, storage)
    if made is not None:
        logger.info("dataset %s is there already", made.uri)
        return made
    data = generate(config.data, storage) if config.data.source == "synthetic" else config.data
    inputs = _find_inputs(data, storage)
    columns = find_event_columns(storage, inputs["events"][0].uri, data.columns)
    job = Job(storage, _dataset_uri(config, storage), data, next(name for name in columns if name in ("timestamp", "position")))
    if data.split == "time" and job.time_column != TIMESTAMP:
        raise UserError(
            f"data.split = 'time': {inputs['events'][0].uri} has no column '{data.columns.timestamp}'; 'leave_one_out' would work"
        )
    manifest = _run_passes(job, inputs, _identify_inputs(config.data, storage))
    storage.create(join(job.uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    storage.delete_tree(job.staging())
    _log_counts(manifest)
    return Dataset.open(storage, job.uri)


@dataclass(frozen=True)
class _Events:
    """What the passes before the shards know of the events: the staged generation, its partitions, what was rejected."""

    generation: int
    partitions: list[Outcome]
    rejected: Counter[str]


def _run_passes(job: Job, inputs: dict[str, list[ObjectInfo]], identity: list[dict[str, Any]]) -> DatasetManifest:
    items, kinds, item_rejects = _read_items(job, inputs["items"])
    events = _merge(job, inputs["events"])
    if job.data.k_core:
        events = _filter_core(job, events)
    if not any(outcome["rows"] for outcome in events.partitions):
        raise UserError(
            f"data.events = {job.data.events}: no interaction is left; rejected: {dict(events.rejected) or 'none, there are no rows'}"
        )
    event_kinds = order_event_kinds({kind for outcome in events.partitions for kind in outcome["event_kinds"]}, job.data.event_kinds)
    if len(event_kinds) > _MAX_EVENT_KINDS:
        raise UserError(
            f"data.columns.event = '{job.data.columns.event}': has {len(event_kinds)} kinds; at most {_MAX_EVENT_KINDS} are possible"
        )
    ids, num_without_entry = _index_items(job, events.generation, items)
    shards = _write_all(job, events, event_kinds, inputs["users"])
    catalogue = build_catalogue(ids, items, kinds, _train_counts(job, len(ids)))
    num_values, value_mean, value_std = _moments(shards)
    if not any(outcome["train"] for outcome in shards):
        raise UserError(f"data.events = {job.data.events}: no user has two training interactions, so there is nothing to train on")
    return _finish(
        inputs=identity,
        data_config=_content_config(job.data),
        tie_rule=TIE_RULE,
        num_users=sum(outcome["num_users"] for outcome in events.partitions),
        num_items=len(ids),
        num_interactions=sum(outcome["rows"] for outcome in events.partitions),
        num_targets=sum(outcome["num_targets"] for outcome in shards),
        rejected={reason: count for reason, count in sorted((events.rejected + Counter(item_rejects)).items()) if count},
        items_without_catalogue_entry=num_without_entry,
        event_kinds=event_kinds,
        tasks=derive_tasks(event_kinds, num_values, job.data.like_threshold),
        value_mean=value_mean,
        value_std=value_std,
        has_time=job.time_column == TIMESTAMP,
        num_streams=job.data.num_streams,
        category_vocabulary=catalogue.category_vocabulary,
        number_columns=catalogue.number_columns,
        vector_size=catalogue.vector_size,
        train_shards=[outcome["train"] for outcome in shards if outcome["train"]],
        users_shards=[outcome["users"] for outcome in shards if outcome["users"]],
        catalogue_shards=_write_catalogue(job, catalogue),
    )


def _finish(**fields: Any) -> DatasetManifest:
    unsigned = DatasetManifest(fingerprint="", **fields)
    return unsigned.model_copy(update={"fingerprint": content_fingerprint(unsigned.model_dump(mode="json"))})


def _read_items(job: Job, files: list[ObjectInfo]) -> tuple[pa.Table | None, dict[str, FeatureKind], dict[str, int]]:
    if not files:
        return None, {}, {}
    table, kinds = import_items(job.storage, files, job.data.columns, job.data.item_features)
    items, rejected = clean_items(table)
    logger.info("items: %d rows; features: %s", items.num_rows, ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none")
    return items, kinds, rejected


def _merge(job: Job, files: list[ObjectInfo]) -> _Events:
    """Clean the events and gather them by partition of their users."""
    staged = run_tasks("events", _numbered(stage_events, job), list(enumerate(plan_parts(job.storage, files))))
    if not any(outcome["rows"] for outcome in staged):
        raise UserError(f"data.events = {job.data.events}: has no rows")
    pieces = [piece for outcome in staged for piece in outcome["pieces"]]
    merged = run_tasks("partitions", partial(merge_events, job, pieces), range(job.data.num_shards))
    return _Events(0, merged, _sum_rejects((*staged, *merged)))


def _filter_core(job: Job, events: _Events) -> _Events:
    """Drop users and items with fewer than k_core interactions until none is left."""
    generation, rejected = events.generation, events.rejected
    while True:
        counts = _item_counts(job, generation)
        generation += 1
        write_table(
            job.storage, job.staged("survivors", generation, 0), counts.filter(pc.greater_equal(counts["count_sum"], job.data.k_core))
        )
        partitions = run_tasks(f"k-core round {generation}", partial(core_round, job, generation), range(job.data.num_shards))
        removed = _sum_rejects(partitions)
        rejected = rejected + removed
        if not removed.total():
            return _Events(generation, partitions, rejected)


def _item_counts(job: Job, generation: int) -> pa.Table:
    tables = [read_table(job.storage, job.staged("items", generation, partition)) for partition in range(job.data.num_shards)]
    return pa.concat_tables(tables).group_by(ITEM_ID, use_threads=False).aggregate([("count", "sum")])


def _index_items(job: Job, generation: int, items: pa.Table | None) -> tuple[pa.Array, int]:
    """Number the items: those of the catalogue and those of events alone; under k_core only those that events have left."""
    seen = set(_item_counts(job, generation)[ITEM_ID].to_pylist())
    listed = set(items[ITEM_ID].to_pylist()) if items is not None else set()
    ids = pa.array(sort_ids(list(seen if job.data.k_core else seen | listed)), pa.string())
    write_table(job.storage, job.staging(ITEM_INDEX_NAME), pa.table({ITEM_ID: ids}))
    return ids, len(seen - listed) if items is not None else 0


def _write_all(job: Job, events: _Events, event_kinds: tuple[str, ...], user_files: list[ObjectInfo]) -> list[Outcome]:
    staged = run_tasks("users", _numbered(stage_users, job), list(enumerate(plan_parts(job.storage, user_files)))) if user_files else []
    pieces = tuple(piece for outcome in staged for piece in outcome["pieces"])
    first_users = np.cumsum([0, *(outcome["num_users"] for outcome in events.partitions)]).tolist()
    tasks = [WriteTask(number, events.generation, first_users[number], event_kinds, pieces) for number in range(job.data.num_shards)]
    return run_tasks("shards", partial(write_shards, job), tasks)


def _train_counts(job: Job, num_items: int) -> Any:
    counts = np.zeros(num_items, np.int64)
    for partition in range(job.data.num_shards):
        staged = read_table(job.storage, job.staged("train-counts", 0, partition))
        counts[staged["item_index"].to_numpy() - 1] += staged["count"].to_numpy()
    return counts


def _write_catalogue(job: Job, catalogue: Catalogue) -> list[Outcome]:
    shards = []
    for number, first in enumerate(range(0, catalogue.table.num_rows, _CATALOGUE_SHARD_ROWS)):
        shard = write_shard(job, f"catalogue/{number:05d}.parquet", catalogue.table.slice(first, _CATALOGUE_SHARD_ROWS))
        shards += [shard] if shard else []
    return shards


def _moments(shards: list[Outcome]) -> tuple[int, float, float]:
    """Number, mean and standard deviation of the training values; 0 and 1 where there are none to tell."""
    number, total, squares = (sum(outcome["values"][index] for outcome in shards) for index in range(3))
    if not number:
        return 0, 0.0, 1.0
    mean = total / number
    return int(number), mean, max(squares / number - mean**2, 0.0) ** 0.5 or 1.0


def _sum_rejects(outcomes: Iterable[Outcome]) -> Counter[str]:
    return sum((Counter(outcome["rejected"]) for outcome in outcomes), Counter())


def _numbered(function: Any, job: Job) -> Any:
    """Make `function(job, number, part)` one of a (number, part) pair."""
    return lambda task: function(job, *task)


def _find_inputs(data: DataConfig, storage: Storage) -> dict[str, list[ObjectInfo]]:
    if not data.events and not data.folder:
        raise UserError("data.events: is empty; give a file or folder of events, data.folder, or data.source = 'synthetic'")
    uris = {"events": data.events, "items": data.items, "users": data.users}
    return {role: find_files(storage, role, uri) if uri else find_in_folder(storage, role, data.folder) for role, uri in uris.items()}


def _identify_inputs(data: DataConfig, storage: Storage) -> list[dict[str, Any]]:
    """Describe the input as it is before any work; the generator's is its config."""
    if data.source == "synthetic":
        return [{"role": "synthetic", "version": GENERATOR_VERSION, **data.synthetic.model_dump(mode="json")}]
    return [
        {"role": role, "uri": file.uri, "num_bytes": file.num_bytes, "etag": file.etag}
        for role, files in _find_inputs(data, storage).items()
        for file in files
    ]


def _content_config(data: DataConfig) -> dict[str, Any]:
    """The part of the config that decides what a dataset contains; where its input lies does not."""
    left_out = {"dataset", "folder", "events", "items", "users"} | (set() if data.source == "synthetic" else {"synthetic"})
    return data.model_dump(mode="json", exclude=left_out)


def _dataset_uri(config: Config, storage: Storage) -> str:
    identity = [FORMAT_VERSION, _identify_inputs(config.data, storage), _content_config(config.data)]
    return storage.uri("datasets", hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12])


def _log_counts(manifest: DatasetManifest) -> None:
    logger.info(
        "%d users, %d items, %d interactions; rejected: %s; items without a catalogue entry: %d; %s",
        manifest.num_users,
        manifest.num_items,
        manifest.num_interactions,
        manifest.rejected or "none",
        manifest.items_without_catalogue_entry,
        manifest.tie_rule,
    )
