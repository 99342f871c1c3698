"""The task bodies of an appended version, each on one partition of the users; the rules are written down in `append.py`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.inputs.formats import INPUT_ORDER
from recsys.data.manifest import Dataset, last_rows
from recsys.data.preparing.cleaning import notice_order
from recsys.data.preparing.partitions import (
    Job,
    gather_events,
    index_events,
    nobodys_attributes,
    stage_counts,
    stage_generation,
    staged_attributes,
    user_offsets,
    write_shard,
)
from recsys.data.preparing.ray_tasks import Outcome
from recsys.data.preparing.sequence_tables import COLUMNS, Sequences
from recsys.data.preparing.sequences import Integers, gather_ranges, split_counts
from recsys.data.preparing.shuffle import read_table
from recsys.schema import USER_ID, USERS_SCHEMA

KNOWN_INDEX_NAME = "known_items.parquet"
"""The staged item index of the base."""

_KEYS = ("user", "item", "time", "kind")


@dataclass(frozen=True)
class AppendTask:
    """One partition's part in writing the shards; its new users are numbered from `first_user`."""

    partition: int
    first_user: int


def merge_day(job: Job, base: Dataset, partition: int) -> Outcome:
    """Gather one partition of the day's events, drop what is known already, and stage the rest as generation 0."""
    events, rejected = gather_events(job, partition)
    known = _known_users(base, partition, events[USER_ID])
    columns = index_events(job, events, base.manifest.event_kinds, KNOWN_INDEX_NAME)
    owners = pc.fill_null(pc.index_in(events[USER_ID], value_set=known[USER_ID].combine_chunks()), -1).to_numpy().astype(np.int64)
    is_known = _agree(owners, columns, known)
    is_late = (owners >= 0) & ~is_known & (columns["timestamps"] < _newest(known)[owners])
    fresh = events.filter(pa.array(~is_known)).combine_chunks()
    outcome = stage_generation(job, 0, partition, fresh, {**rejected, "known": int(is_known.sum())})
    num_new_users = pc.count_distinct(pc.filter(events[USER_ID], pa.array(owners < 0))).as_py()
    return {**outcome, "num_users": num_new_users, "noticed": {**notice_order(fresh), "late": int(is_late.sum())}}


def append_shards(job: Job, base: Dataset, task: AppendTask) -> Outcome:
    """Write one partition's rows of active users and their new samples, and stage what its training counts change by."""
    events = read_table(job.storage, job.staged("events", 0, task.partition)).combine_chunks()
    day_offsets = user_offsets(events[USER_ID])
    day_ids = events[USER_ID].take(pa.array(day_offsets[:-1]))
    known = _known_users(base, task.partition, day_ids)
    known_ids = known[USER_ID].combine_chunks()
    is_new = pc.is_null(pc.index_in(day_ids, value_set=known_ids)).to_numpy(zero_copy_only=False)
    user_ids = pa.concat_arrays([known_ids, day_ids.filter(pa.array(is_new)).combine_chunks()])
    indices = np.concatenate([known["user_index"].to_numpy(), task.first_user + np.arange(int(is_new.sum()))])
    rows_of_day = pc.index_in(user_ids, value_set=day_ids.combine_chunks()).to_numpy()
    day = Sequences(index_events(job, events, base.manifest.event_kinds), day_offsets)
    sequences, num_known = _join(known, day, rows_of_day)
    num_trained = np.concatenate([known["num_train"].to_numpy().astype(np.int64), np.zeros(int(is_new.sum()), np.int64)])
    by_rule, num_validation = split_counts(sequences.columns["timestamps"], sequences.offsets, job.data)
    num_train = np.maximum(by_rule, num_trained)  # what was trained on is not held out any more
    num_validation = by_rule + num_validation - num_train
    first_targets = np.maximum(num_known, 1)
    attributes = pa.concat_arrays([known["attributes"].combine_chunks(), nobodys_attributes(int(is_new.sum()))])
    users = sequences.users_table(
        indices, user_ids, num_train, num_validation, staged_attributes(job, task.partition, user_ids, attributes)
    )
    train = sequences.train_table(indices, first_targets, num_train, job.data)
    _stage_changes(job, task.partition, sequences, num_trained, num_train)
    return {
        "rows": events.num_rows,
        "users": write_shard(job, f"users/{task.partition:05d}.parquet", users),
        "train": write_shard(job, f"train/{task.partition:05d}.parquet", train),
        "num_targets": int(np.maximum(num_train - first_targets, 0).sum()),
    }


def _known_users(base: Dataset, partition: int, user_ids: pa.ChunkedArray) -> pa.Table:
    """Read the newest rows of some of a partition's users, sorted by index; every version names its shards by partition."""
    wanted = pc.unique(user_ids)
    name = f"users/{partition:05d}.parquet"
    tables = [USERS_SCHEMA.empty_table()]
    for shard in base.manifest.users_shards:
        if shard.path == name:
            users = base.read_shard(shard)
            tables.append(users.filter(pc.is_in(users[USER_ID], value_set=wanted)))
    return last_rows(pa.concat_tables(tables), "user_index").combine_chunks()


def _agree(owners: Integers, columns: dict[str, Any], known: pa.Table) -> Any:
    """Tell which events agree with a known one in user, item, time and kind."""
    keys = [owners, columns["items"].astype(np.int64), columns["timestamps"], columns["events"].astype(np.int64)]
    lengths = known["items"].combine_chunks().value_lengths().to_numpy()
    flat = [known[name].combine_chunks().flatten().to_numpy().astype(np.int64) for name in ("items", "timestamps", "events")]
    history = pa.table([np.repeat(np.arange(known.num_rows), lengths), *flat], names=list(_KEYS))
    rows = pa.table([*keys, np.arange(len(owners))], names=[*_KEYS, INPUT_ORDER])
    found = rows.join(history, keys=list(_KEYS), join_type="left semi", use_threads=False)[INPUT_ORDER].to_numpy()
    is_known = np.zeros(len(owners), bool)
    is_known[found] = True
    return is_known


def _newest(known: pa.Table) -> Integers:
    """Return the time of each known user's newest interaction, and one more for whoever is not known."""
    lists = known["timestamps"].combine_chunks()
    newest = np.maximum.reduceat(lists.flatten().to_numpy(), lists.offsets.to_numpy()[:-1]) if known.num_rows else np.zeros(0, np.int64)
    return np.append(newest, np.iinfo(np.int64).min)


def _join(known: pa.Table, day: Sequences, rows_of_day: Integers) -> tuple[Sequences, Integers]:
    """Put the day's interactions behind each user's known ones; also tell how many those are."""
    lengths = known["items"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
    num_known = np.concatenate([lengths, np.zeros(len(rows_of_day) - len(lengths), np.int64)])
    history = {name: known[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in COLUMNS}
    ends = np.cumsum(num_known)
    shift = int(ends[-1]) if len(ends) else 0
    starts = np.stack([ends - num_known, shift + day.offsets[:-1][rows_of_day]], axis=1).reshape(-1)
    stops = np.stack([ends, shift + day.offsets[1:][rows_of_day]], axis=1).reshape(-1)
    positions, offsets = gather_ranges(starts, stops)
    columns = {name: np.concatenate([history[name], day.columns[name]])[positions] for name in COLUMNS}
    return Sequences(columns, offsets[::2]), num_known


def _stage_changes(job: Job, partition: int, sequences: Sequences, before: Integers, after: Integers) -> None:
    """Stage by how much the number of training interactions of each item changes, where a user's go from `before` to `after`."""
    gained, lost = sequences.within("items", before, after), sequences.within("items", after, before)
    items, where = np.unique(np.concatenate([gained, lost]), return_inverse=True)
    signs = np.concatenate([np.ones(len(gained)), -np.ones(len(lost))])
    stage_counts(job, partition, items, np.bincount(where, signs, len(items)).astype(np.int64))
