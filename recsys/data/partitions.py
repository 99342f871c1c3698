"""The task bodies of prepare_data, each a function of its job and number alone; what runs when is `prepare.py`."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.config import DataConfig
from recsys.data.cleaning import apply_rules, cast_events, cast_ids, drop_bots, drop_duplicates, notice_ids, notice_order, valid_text
from recsys.data.formats import INPUT_ORDER, FilePart
from recsys.data.importers import find_event_columns, import_events, import_users
from recsys.data.manifest import Shard
from recsys.data.pseudonyms import pseudonymise
from recsys.data.sequences import Integers, cut_windows, gather_ranges, split_counts
from recsys.data.shuffle import read_partition, read_table, write_pieces, write_table
from recsys.errors import UserError
from recsys.schema import EVENT, EVENTS_SCHEMA, ITEM_ID, TIMESTAMP, TRAIN_SCHEMA, USER_ID, USERS_SCHEMA, VALUE
from recsys.storage import Storage, join, sha256_of

ITEM_INDEX_NAME = "item_index.parquet"
_ATTRIBUTES = "attributes"
_STAGED_USERS = pa.schema([USERS_SCHEMA.field(USER_ID), USERS_SCHEMA.field(_ATTRIBUTES), EVENTS_SCHEMA.field(INPUT_ORDER)])
_SEQUENCES = ("items", "events", "timestamps", "values")
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every task of one preparation knows."""

    storage: Storage
    uri: str
    data: DataConfig
    time_column: str

    @property
    def has_time(self) -> bool:
        """Whether the order of events is their time; otherwise it is a position."""
        return self.time_column == TIMESTAMP

    def staging(self, *parts: str) -> str:
        """Address something that goes when the dataset is finished."""
        return join(self.uri, "staging", *parts)

    def staged(self, table: str, generation: int, partition: int) -> str:
        """Address one partition of a staged table; each k-core round is a generation."""
        return self.staging(f"{table}-{generation:04d}", f"{partition:05d}.parquet")


def stage_events(job: Job, task: int, part: FilePart) -> Outcome:
    """Cast and clean one part of the events and write it as pieces, user ids as pseudonyms where a key is named."""
    if job.time_column not in find_event_columns(job.storage, part.uri, job.data.columns):
        raise UserError(f"{part.uri}: has no column for {job.time_column}, which the first file of data.events has")
    rejected: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    num_rows = 0

    def cleaned() -> Any:
        nonlocal num_rows
        for raw in import_events(job.storage, part, job.data.columns):
            events, faults = cast_events(raw)
            events, broken = apply_rules(events, job.data.cleaning, job.has_time)
            num_rows += raw.num_rows
            rejected.update(faults + broken)
            noticed.update(notice_ids(events))
            yield _with_pseudonyms(job, events)

    pieces = write_pieces(job.storage, job.staging("pieces"), task, cleaned(), USER_ID, job.data.num_shards)
    return {"rows": num_rows, "pieces": pieces, "rejected": rejected, "noticed": noticed}


def _with_pseudonyms(job: Job, table: pa.Table) -> pa.Table:
    ids = pseudonymise(table[USER_ID], job.data.pseudonym_key_env)
    return table.set_column(table.column_names.index(USER_ID), table.schema.field(USER_ID), ids)


def stage_users(job: Job, task: int, part: FilePart) -> Outcome:
    """Turn one part of the users' table into ids with attributes and write it as pieces."""
    tables = (_with_pseudonyms(job, _with_attributes(raw)) for raw in import_users(job.storage, part, job.data.columns))
    pieces = write_pieces(job.storage, job.staging("user-pieces"), task, tables, USER_ID, job.data.num_shards)
    return {"rows": 0, "pieces": pieces}


def _with_attributes(raw: pa.Table) -> pa.Table:
    names = [name for name in raw.column_names if name not in (USER_ID, INPUT_ORDER)]
    rows = zip(*(_as_text(raw[name]).to_pylist() for name in names), strict=True) if names else [()] * raw.num_rows
    pairs = [[(name, value) for name, value in zip(names, row, strict=True) if value] for row in rows]
    attributes = pa.array(pairs, _STAGED_USERS.field(_ATTRIBUTES).type)
    table = pa.table([cast_ids(raw[USER_ID], USER_ID), attributes, raw[INPUT_ORDER]], schema=_STAGED_USERS)
    return table.filter(table[USER_ID].is_valid())


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.binary_join(column.cast(pa.list_(pa.string())), " ") if pa.types.is_list(column.type) else column.cast(pa.string())
    return valid_text(text)


def merge_events(job: Job, pieces: list[str], partition: int) -> Outcome:
    """Gather one partition of the events, drop duplicates and bots, sort by the tie rule, stage it as generation 0."""
    events, num_duplicates = drop_duplicates(read_partition(job.storage, pieces, partition, EVENTS_SCHEMA))
    events, num_of_bots = drop_bots(events, job.data.cleaning.max_events_per_minute if job.has_time else None)
    outcome = _stage_generation(job, 0, partition, events, {"duplicate": num_duplicates, "bot": num_of_bots})
    return {**outcome, "noticed": notice_order(events)}


def core_round(job: Job, generation: int, partition: int) -> Outcome:
    """Drop the items that did not survive, then the users left with fewer than k_core interactions."""
    before = read_table(job.storage, job.staged("events", generation - 1, partition))
    survivors = read_table(job.storage, job.staged("survivors", generation, 0))[ITEM_ID].combine_chunks()
    of_items = before.filter(pc.is_in(before[ITEM_ID], value_set=survivors))
    counts = of_items.group_by(USER_ID, use_threads=False).aggregate([(ITEM_ID, "count")])
    active = counts.filter(pc.greater_equal(counts[f"{ITEM_ID}_count"], job.data.k_core))[USER_ID].combine_chunks()
    after = of_items.filter(pc.is_in(of_items[USER_ID], value_set=active))
    rejected = {"k_core_item": before.num_rows - of_items.num_rows, "k_core_user": of_items.num_rows - after.num_rows}
    return _stage_generation(job, generation, partition, after, rejected)


def _stage_generation(job: Job, generation: int, partition: int, events: pa.Table, rejected: dict[str, int]) -> Outcome:
    write_table(job.storage, job.staged("events", generation, partition), events)
    counts = events.group_by(ITEM_ID, use_threads=False).aggregate([(INPUT_ORDER, "count")]).rename_columns([ITEM_ID, "count"])
    write_table(job.storage, job.staged("items", generation, partition), counts)
    return {
        "rows": events.num_rows,
        "num_users": pc.count_distinct(events[USER_ID]).as_py(),
        "event_kinds": sorted(pc.unique(events[EVENT]).to_pylist()),
        "rejected": rejected,
    }


@dataclass(frozen=True)
class WriteTask:
    """One partition's part in writing the shards."""

    partition: int
    generation: int
    first_user: int
    event_kinds: tuple[str, ...]
    user_pieces: tuple[str, ...]


def write_shards(job: Job, task: WriteTask) -> Outcome:
    """Write one partition's users shard and train shard, and stage its training counts by item."""
    events = read_table(job.storage, job.staged("events", task.generation, task.partition)).combine_chunks()
    ids = read_table(job.storage, job.staging(ITEM_INDEX_NAME))[ITEM_ID].combine_chunks()
    offsets = _user_offsets(events[USER_ID])
    columns = {
        "items": pc.index_in(events[ITEM_ID], value_set=ids).to_numpy().astype(np.int32) + 1,
        "events": pc.index_in(events[EVENT], value_set=pa.array(task.event_kinds)).to_numpy().astype(np.int8),
        "timestamps": events[TIMESTAMP].to_numpy(),
        "values": events[VALUE].to_numpy(),
    }
    num_train, num_validation = split_counts(columns["timestamps"], offsets, job.data)
    user_indices = task.first_user + np.arange(len(num_train))
    user_ids = events[USER_ID].take(pa.array(offsets[:-1]))
    users = pa.table(
        [
            pa.array(user_indices, pa.int64()),
            user_ids,
            *(_lists(columns[name], offsets) for name in _SEQUENCES),
            pa.array(num_train, pa.int32()),
            pa.array(num_validation, pa.int32()),
            _attributes(job, task, user_ids),
        ],
        schema=USERS_SCHEMA,
    )
    train = _train_table(columns, offsets, num_train, user_indices, job.data)
    in_training, _ = gather_ranges(offsets[:-1], offsets[:-1] + num_train)
    values = columns["values"][in_training].astype(np.float64)
    values = values[np.isfinite(values)]
    _stage_counts(job, task.partition, columns["items"][in_training])
    return {
        "rows": events.num_rows,
        "users": write_shard(job, f"users/{task.partition:05d}.parquet", users),
        "train": write_shard(job, f"train/{task.partition:05d}.parquet", train),
        "num_targets": int(np.maximum(num_train - 1, 0).sum()),
        "values": [len(values), float(values.sum()), float((values**2).sum())],
    }


def write_shard(job: Job, path: str, table: pa.Table) -> dict[str, Any] | None:
    """Write a table as a shard and describe it as `Shard` does; a table without rows gives none."""
    if table.num_rows == 0:
        return None
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.parquet"
        pq.write_table(table, local, row_group_size=job.data.row_group_rows)
        metadata = pq.read_metadata(local)
        row_groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        shard = Shard(path=path, row_groups=row_groups, num_bytes=local.stat().st_size, sha256=sha256_of(local))
        job.storage.upload(local, join(job.uri, path))
    return shard.model_dump(mode="json")


def _train_table(
    columns: dict[str, np.ndarray[Any, Any]], offsets: Integers, num_train: Integers, user_indices: Integers, data: DataConfig
) -> pa.Table:
    stride = data.window_stride or data.max_history
    windows = [(user, window) for user, length in enumerate(num_train.tolist()) for window in cut_windows(length, data.max_history, stride)]
    owners = np.array([user for user, _ in windows], np.int64)
    starts = np.array([window.start for _, window in windows], np.int64) + offsets[owners]
    stops = np.array([window.stop for _, window in windows], np.int64) + offsets[owners]
    positions, bounds = gather_ranges(starts, stops)
    return pa.table(
        [
            pa.array(user_indices[owners], pa.int64()),
            *(_lists(columns[name][positions], bounds) for name in _SEQUENCES),
            pa.array([window.first_target for _, window in windows], pa.int32()),
        ],
        schema=TRAIN_SCHEMA,
    )


def _user_offsets(user_ids: pa.ChunkedArray) -> Integers:
    """Where each user begins in a column sorted by user, and where the last one ends."""
    codes = user_ids.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.concatenate([np.flatnonzero(np.diff(codes, prepend=-1)), [len(codes)]]).astype(np.int64)


def _lists(values: np.ndarray[Any, Any], offsets: Integers) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _attributes(job: Job, task: WriteTask, user_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    staged = read_partition(job.storage, task.user_pieces, task.partition, _STAGED_USERS)
    nobody = pa.table([pa.nulls(1, pa.string()), pa.array([[]], staged[_ATTRIBUTES].type), pa.array([0], pa.int64())], schema=_STAGED_USERS)
    known = pa.concat_tables([staged, nobody]).combine_chunks()
    # index_in finds the first row of an id, which is the first by input order, since pieces are read in that order.
    rows = pc.fill_null(pc.index_in(user_ids, value_set=staged[USER_ID].combine_chunks()), known.num_rows - 1)
    return known[_ATTRIBUTES].take(rows)


def _stage_counts(job: Job, partition: int, items: np.ndarray[Any, Any]) -> None:
    indices, counts = np.unique(items, return_counts=True)
    write_table(job.storage, job.staged("train-counts", 0, partition), pa.table({"item_index": indices, "count": counts}))
