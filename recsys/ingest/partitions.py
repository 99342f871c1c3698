"""The tasks of a preparation, each a function of the job and a partition's number."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask
from recsys.config.data import AUTO, DataConfig
from recsys.data.manifest import ColumnUse, Shard
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import (
    apply_rules,
    cast_events,
    drop_bots,
    drop_duplicates,
    is_long,
    normalise_queries,
    notice_ids,
    notice_order,
    notice_rounded,
)
from recsys.ingest.clean.overlap import Overlap
from recsys.ingest.clean.pseudonyms import pseudonymise
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.clean.times import UNIT_NAMES, find_other_unit
from recsys.ingest.report.counts import Limits
from recsys.ingest.shuffle import read_partition, read_table, write_pieces, write_table
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER, FilePart
from recsys.ingest.sources.importers import import_events, import_users
from recsys.ingest.sources.sandbox import reading
from recsys.ingest.sources.scalars import ids_of
from recsys.ingest.write.sequence_tables import by_part, train_table, users_table
from recsys.ingest.write.splits import TRAINING, WITHHELD, split_events
from recsys.ingest.write.statistics import Moments, read_histories
from recsys.schema import COUNTS_SCHEMA, EVENT, EVENTS_SCHEMA, ITEM_ID, QUERIES_SCHEMA, QUERY, TIMESTAMP, USER_ID, USERS_SCHEMA, VALUE
from recsys.store import Storage, join, sha256_of

ITEM_INDEX_NAME = "item_index.parquet"
IS_WITHHELD = "is_withheld"
_ATTRIBUTES = "attributes"
_STAGED_USERS = pa.schema([USERS_SCHEMA.field(USER_ID), USERS_SCHEMA.field(_ATTRIBUTES), EVENTS_SCHEMA.field(INPUT_ORDER)])
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every task of one preparation knows."""

    storage: Storage
    uri: str
    data: DataConfig
    time_column: str
    time_unit: str = "s"

    @property
    def has_time(self) -> bool:
        """Whether the order of events is their time; otherwise it is a position."""
        return self.time_column == TIMESTAMP

    @property
    def num_partitions(self) -> int:
        """How many partitions the users are hashed into; chosen before the first task."""
        assert self.data.num_shards is not None
        return self.data.num_shards

    def staging(self, *parts: str) -> str:
        """Address something that goes when the dataset is finished."""
        return join(self.uri, "staging", *parts)

    def staged(self, table: str, generation: int, partition: int) -> str:
        """Address one partition of a staged table; each k-core round is a generation."""
        return self.staging(f"{table}-{generation:04d}", f"{partition:05d}.parquet")


def stage_events(job: Job, task: int, parts: Sequence[FilePart]) -> Outcome:
    """Cast and clean some parts of the events and write them as pieces, user ids as pseudonyms where a key is named."""
    rejects, noticed, uses = Rejects(), Counter[str](), list[ColumnUse]()
    num_rows = 0

    def cleaned(part: FilePart) -> Iterator[pa.Table]:
        nonlocal num_rows
        imported = import_events(job.storage, part, job.data, job.time_column)
        uses.extend(imported.uses)
        for raw in imported:
            with reading(part.uri):
                _check_unit(job, raw)
                events, faults = cast_events(raw, job.time_unit)
            events, broken = apply_rules(events, job.data.cleaning, job.has_time, raw)
            num_rows += raw.num_rows
            rejects.merge(faults)
            rejects.merge(broken)
            events, of_queries = normalise_queries(events)
            noticed.update(notice_ids(events) + of_queries + notice_rounded(raw))
            yield _with_pseudonyms(job, events)

    tables = (table for part in parts for table in cleaned(part))
    write_pieces(job.storage, job.staging("pieces"), task, tables, USER_ID, job.num_partitions)
    _hide_users(job, rejects, "null_user", "long_id", "negative_id")
    return {"rows": num_rows, **rejects.outcome(), "noticed": noticed, "uses": _distinct(uses)}


def _check_unit(job: Job, raw: pa.Table) -> None:
    """Refuse times whose digits tell another unit than those of the first file, where the unit is told by the digits."""
    if not job.has_time or job.data.time_unit != AUTO:
        return
    found = find_other_unit(raw[TIMESTAMP], job.time_unit)
    if found is not None:
        place, number = found
        row = raw[INPUT_ORDER][place].as_py() % (1 << FILE_SHIFT) + 1
        raise UserError(
            f"row {row}: the time {number} is not in {UNIT_NAMES[job.time_unit]}, as the first of the input are by their digits; "
            "set data.time_unit to the unit of all"
        )


def _hide_users(job: Job, rejects: Rejects, *rules: str) -> None:
    if job.data.pseudonym_key_env:
        rejects.hide(rules)


def _distinct(uses: Sequence[ColumnUse]) -> list[dict[str, Any]]:
    return [use.model_dump() for use in dict.fromkeys(uses)]


def _with_pseudonyms(job: Job, table: pa.Table) -> pa.Table:
    ids = pseudonymise(table[USER_ID], job.data.pseudonym_key_env)
    return table.set_column(table.column_names.index(USER_ID), table.schema.field(USER_ID), ids)


def stage_users(job: Job, task: int, parts: Sequence[FilePart]) -> Outcome:
    """Turn some parts of the users' table into ids with attributes and write them as pieces."""
    rejects, uses = Rejects(), list[ColumnUse]()
    num_rows = 0

    def staged(part: FilePart) -> Iterator[pa.Table]:
        nonlocal num_rows
        imported = import_users(job.storage, part, job.data)
        uses.extend(imported.uses)
        for raw in imported:
            with reading(part.uri):
                users = _with_attributes(raw, rejects)
            num_rows += raw.num_rows
            yield _with_pseudonyms(job, users)

    tables = (table for part in parts for table in staged(part))
    write_pieces(job.storage, job.staging("user-pieces"), task, tables, USER_ID, job.num_partitions)
    _hide_users(job, rejects, "user_null_id", "user_long_id")
    return {"rows": num_rows, **rejects.outcome(), "uses": _distinct(uses)}


def _with_attributes(raw: pa.Table, rejects: Rejects) -> pa.Table:
    names = [name for name in raw.column_names if name not in (USER_ID, INPUT_ORDER)]
    rows = zip(*(raw[name].to_pylist() for name in names), strict=True) if names else [()] * raw.num_rows
    pairs = [[(name, value) for name, value in zip(names, row, strict=True) if value] for row in rows]
    attributes = pa.array(pairs, _STAGED_USERS.field(_ATTRIBUTES).type)
    ids = ids_of(raw[USER_ID], USER_ID)
    rejects.add("user_null_id", ids.is_null(), raw[INPUT_ORDER], raw[USER_ID])
    rejects.add("user_long_id", is_long(ids), raw[INPUT_ORDER], ids)
    table = pa.table([ids, attributes, raw[INPUT_ORDER]], schema=_STAGED_USERS)
    return table.filter(pc.and_(ids.is_valid(), pc.invert(is_long(ids))))


def merge_events(job: Job, partition: int) -> Outcome:
    """Gather one partition of the events and stage it as generation 0."""
    events, rejects = gather_events(job, partition)
    return {**stage_generation(job, 0, partition, events, rejects), "noticed": notice_order(events)}


def gather_events(job: Job, partition: int) -> tuple[pa.Table, Rejects]:
    """Read one partition of the pieces without duplicates and bots, sorted by the tie rule, and count what went."""
    rejects = Rejects()
    pieces = read_partition(job.storage, job.staging("pieces"), partition, EVENTS_SCHEMA)
    distinct, _ = drop_duplicates(pieces)
    rejects.add_missing("duplicate", pieces, distinct)
    events, _ = drop_bots(distinct, job.data.cleaning.max_events_per_minute if job.has_time else None)
    rejects.add_missing("bot", distinct, events)
    return events, rejects


def core_round(job: Job, generation: int, partition: int) -> Outcome:
    """Drop the items that did not survive, then the users left with fewer than k_core interactions."""
    before = read_table(job.storage, job.staged("events", generation - 1, partition))
    survivors = read_table(job.storage, job.staged("survivors", generation, 0))[ITEM_ID].combine_chunks()
    of_items = before.filter(pc.is_in(before[ITEM_ID], value_set=survivors))
    counts = of_items.group_by(USER_ID, use_threads=False).aggregate([(ITEM_ID, "count")])
    active = counts.filter(pc.greater_equal(counts[f"{ITEM_ID}_count"], job.data.k_core))[USER_ID].combine_chunks()
    after = of_items.filter(pc.is_in(of_items[USER_ID], value_set=active))
    rejects = Rejects()
    rejects.add_missing("k_core_item", before, of_items)
    rejects.add_missing("k_core_user", of_items, after)
    return stage_generation(job, generation, partition, after, rejects)


def stage_generation(job: Job, generation: int, partition: int, events: pa.Table, rejects: Rejects) -> Outcome:
    """Stage one partition's events and how often each item occurs in them."""
    write_table(job.storage, job.staged("events", generation, partition), events)
    counts = events.group_by(ITEM_ID, use_threads=False).aggregate([(INPUT_ORDER, "count")]).rename_columns([ITEM_ID, "count"])
    write_table(job.storage, job.staged("items", generation, partition), counts)
    return {
        "rows": events.num_rows,
        "num_users": pc.count_distinct(events[USER_ID]).as_py(),
        "num_queries": pc.count_distinct(events[QUERY]).as_py(),
        "event_kinds": sorted(pc.unique(events[EVENT]).to_pylist()),
        **rejects.outcome(),
    }


@dataclass(frozen=True)
class WriteTask:
    """One partition's part in writing the shards."""

    partition: int
    generation: int
    first_user: int
    first_query: int
    event_kinds: tuple[str, ...]


def write_shards(job: Job, task: WriteTask) -> Outcome:
    """Write one partition's users shard and train shard, and stage its training counts by item."""
    events = read_table(job.storage, job.staged("events", task.generation, task.partition)).combine_chunks()
    offsets = user_offsets(events[USER_ID])
    queries, asked = number_queries(events, task.first_query)
    everything = Sequences.of_offsets(index_events(job, events, task.event_kinds) | {"queries": queries}, offsets)
    parts = without_withheld(job, split_events(events, offsets, job.data), everything)
    sequences, num_train, num_validation = by_part(everything, parts)
    user_indices = task.first_user + np.arange(len(num_train))
    user_ids = events[USER_ID].take(pa.array(offsets[:-1]))
    attributes = nobodys_attributes(len(user_ids))
    first_targets = np.ones_like(num_train)
    users, outcome = write_users(
        job, task.partition, sequences, user_indices, user_ids, attributes, first_targets, num_train, num_validation
    )
    training = sequences.within(0, num_train)
    values = training.values.astype(np.float64)
    moments = Moments.of(values, np.zeros(len(values), np.int64), 1)
    stage_counts(job, task.partition, *np.unique(training.items, return_counts=True))
    return {
        **outcome,
        "rows": events.num_rows,
        "rejected": {"withheld": int((parts == WITHHELD).sum())},
        "queries": write_shard(job, f"queries/{task.partition:05d}.parquet", asked),
        "values": [int(moments.count[0]), float(moments.mean[0]), float(moments.deviations[0])],
        "limits": asdict(Limits.of(read_histories(users), job.has_time)),
    }


def write_users(
    job: Job,
    partition: int,
    sequences: Sequences,
    user_indices: Integers,
    user_ids: pa.Array | pa.ChunkedArray,
    known_attributes: pa.Array,
    first_targets: Integers,
    num_train: Integers,
    num_validation: Integers,
) -> tuple[pa.Table, Outcome]:
    """Write a partition's users shard and train shard; return the users and what became of both."""
    attributes, listed = staged_attributes(job, partition, user_ids, known_attributes)
    users = users_table(sequences, user_indices, user_ids, num_train, num_validation, attributes)
    train = train_table(sequences, user_indices, first_targets, num_train, job.data)
    return users, {
        "users": write_shard(job, f"users/{partition:05d}.parquet", users),
        "train": write_shard(job, f"train/{partition:05d}.parquet", train),
        "num_targets": int(np.maximum(num_train - first_targets, 0).sum()),
        "listed": listed,
    }


def index_events(job: Job, events: pa.Table, event_kinds: tuple[str, ...], index_name: str = ITEM_INDEX_NAME) -> dict[str, NDArray[Any]]:
    """Turn staged events into the columns of `Sequences`, by a staged item index; 0 is an item that it has not, -1 such a kind."""
    ids = read_table(job.storage, job.staging(index_name))[ITEM_ID].combine_chunks()
    return {
        "items": pc.fill_null(pc.index_in(events[ITEM_ID], value_set=ids), -1).to_numpy().astype(np.int32) + 1,
        "events": pc.fill_null(pc.index_in(events[EVENT], value_set=pa.array(event_kinds)), -1).to_numpy().astype(np.int8),
        "timestamps": events[TIMESTAMP].to_numpy(),
        "values": events[VALUE].to_numpy(),
    }


def number_queries(events: pa.Table, first: int) -> tuple[NDArray[np.int32], pa.Table]:
    """Number what was asked from `first` on; return each event's index, 0 for none, and the table of texts (QUERIES_SCHEMA)."""
    encoded = events[QUERY].combine_chunks().dictionary_encode()
    indices = pc.fill_null(pc.add(encoded.indices, first), 0).to_numpy().astype(np.int32)
    numbers = pa.array(first + np.arange(len(encoded.dictionary)), pa.int32())
    return indices, pa.table([numbers, encoded.dictionary], schema=QUERIES_SCHEMA)


def without_withheld(job: Job, parts: Integers, sequences: Sequences) -> Integers:
    """Take the training interactions with withheld items out of every part."""
    is_out = (parts == TRAINING) & staged_withheld(job)[sequences.columns["items"] - 1]
    return np.where(is_out, WITHHELD, parts)


def staged_withheld(job: Job) -> Mask:
    """Return for each item, by its index less one, whether it is kept out of training."""
    column = read_table(job.storage, job.staging(ITEM_INDEX_NAME), [IS_WITHHELD])[IS_WITHHELD]
    return np.asarray(column.to_numpy(), bool)


def user_offsets(user_ids: pa.ChunkedArray) -> Integers:
    """Where each user begins in a column sorted by user, and where the last one ends."""
    codes = user_ids.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.concatenate([np.flatnonzero(np.diff(codes, prepend=-1)), [len(codes)]]).astype(np.int64)


def staged_attributes(
    job: Job, partition: int, user_ids: pa.ChunkedArray | pa.Array, known: pa.Array
) -> tuple[pa.ChunkedArray, dict[str, Any]]:
    """Return the attributes that the users' table has of each user, and the `known` ones of a user whom it has not.

    Also tells what there is to tell of the users' table: rows of one user that came later, and how far its users are those of the events.
    """
    staged = read_partition(job.storage, job.staging("user-pieces"), partition, _STAGED_USERS)
    ids = staged[USER_ID].combine_chunks()
    # index_in finds the first row of an id, which is the first by input order, since pieces are read in that order.
    rows = pc.index_in(user_ids, value_set=ids)
    chosen = pc.if_else(rows.is_valid(), rows, pa.array(np.arange(staged.num_rows, staged.num_rows + len(user_ids)), pa.int32()))
    rejects = Rejects()
    is_later = pc.less(pc.index_in(ids, value_set=ids), pa.array(np.arange(len(ids)), pa.int32()))
    rejects.add("user_duplicate", pa.chunked_array([is_later]), staged[INPUT_ORDER], staged[USER_ID])
    mutual = Overlap.of(pc.unique(user_ids), pc.unique(ids)) if len(ids) else Overlap()
    return pa.chunked_array([staged[_ATTRIBUTES].combine_chunks(), known]).take(chosen), {**rejects.outcome(), "overlap": asdict(mutual)}


def nobodys_attributes(num_users: int) -> pa.Array:
    """Return empty attributes for each of some users."""
    return pa.array([[]] * num_users, _STAGED_USERS.field(_ATTRIBUTES).type)


def stage_counts(job: Job, partition: int, items: NDArray[np.int32], counts: Integers) -> None:
    """Stage how many training interactions one partition has of each item."""
    write_table(job.storage, job.staged("train-counts", 0, partition), pa.table([items, counts], schema=COUNTS_SCHEMA))


def write_shard(job: Job, path: str, table: pa.Table) -> dict[str, Any] | None:
    """Write a table as a shard and describe it as `Shard` does; a table without rows gives none."""
    if table.num_rows == 0:
        return None
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.parquet"
        pq.write_table(table, local, row_group_size=job.data.row_group_rows, write_page_checksum=True)
        metadata = pq.read_metadata(local)
        row_groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        num_bytes, sha256 = local.stat().st_size, sha256_of(local)
        job.storage.upload(local, join(job.uri, path))
    stored = job.storage.stat(join(job.uri, path))
    shard = Shard(path=path, row_groups=row_groups, num_bytes=num_bytes, sha256=sha256, etag=stored.etag if stored else "")
    return shard.model_dump(mode="json")
