"""The tasks of an appended version, each on one partition of the users; the rules are in `append.py`."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Integers, Mask
from recsys.data.manifest import Dataset, last_rows
from recsys.data.sequences import Sequences
from recsys.ingest.clean.cleaning import notice_order
from recsys.ingest.partitions import (
    Job,
    gather_events,
    index_events,
    nobodys_attributes,
    number_queries,
    stage_counts,
    stage_generation,
    user_offsets,
    without_withheld,
    write_shard,
    write_users,
)
from recsys.ingest.ray_tasks import Outcome
from recsys.ingest.shuffle import read_table
from recsys.ingest.sources.formats import INPUT_ORDER
from recsys.ingest.write.sequence_tables import by_part
from recsys.ingest.write.splits import TRAINING, WITHHELD, part_by_place, split_events, split_in_order, withheld
from recsys.schema import ITEM_ID, USER_ID, USERS_SCHEMA

KNOWN_INDEX_NAME = "known_items.parquet"
"""The staged item index of the base."""

_KEYS = ("user", "item", "time", "kind")
_PART = "part"


@dataclass(frozen=True)
class AppendTask:
    """One partition's part in writing the shards; its new users and queries are numbered from the first of each."""

    partition: int
    first_user: int
    first_query: int


def merge_day(job: Job, base: Dataset, partition: int) -> Outcome:
    """Gather one partition of the day's events, drop what is known already, and stage the rest as generation 0."""
    events, rejects = gather_events(job, partition)
    known = _known_users(base, partition, events[USER_ID])
    columns = index_events(job, events, base.manifest.event_kinds, KNOWN_INDEX_NAME)
    owners = pc.fill_null(pc.index_in(events[USER_ID], value_set=known[USER_ID].combine_chunks()), -1).to_numpy().astype(np.int64)
    is_known = _agree(owners, columns, known)
    newest = _newest(known)[owners]
    # What was taken out of an older version is not known, so what is not newer than the rest may have been there before.
    is_out = ~is_known & (columns["timestamps"] <= newest) & withheld(events[ITEM_ID], job.data)
    is_fresh = ~is_known & ~is_out
    is_late = is_fresh & (columns["timestamps"] < newest)
    fresh = events.filter(pa.array(is_fresh)).combine_chunks()
    unknown = events.filter(pa.array(~is_known))
    rejects.add_missing("known", events, unknown)
    rejects.add_missing("withheld", unknown, fresh)
    outcome = stage_generation(job, 0, partition, fresh, rejects)
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
    queries, asked = number_queries(events, task.first_query)
    columns = index_events(job, events, base.manifest.event_kinds) | {"queries": queries}
    columns[_PART] = split_events(events, day_offsets, job.data)
    everything, is_day = _join(known, Sequences.of_offsets(columns, day_offsets), rows_of_day)
    num_trained = np.concatenate([known["num_train"].to_numpy().astype(np.int64), np.zeros(int(is_new.sum()), np.int64)])
    parts = _assign_parts(job, everything, is_day)
    sequences, num_train, num_validation = by_part(everything, parts)
    first_targets = np.bincount(everything.owners[(parts == TRAINING) & ~is_day], minlength=len(user_ids)).clip(min=1)
    attributes = pa.concat_arrays([known["attributes"].combine_chunks(), nobodys_attributes(int(is_new.sum()))])
    _, outcome = write_users(job, task.partition, sequences, indices, user_ids, attributes, first_targets, num_train, num_validation)
    stage_counts(job, task.partition, *np.unique(sequences.within(num_trained, num_train).items, return_counts=True))
    return {
        **outcome,
        "rows": events.num_rows,
        "rejected": {"withheld": int((parts == WITHHELD).sum())},
        "queries": write_shard(job, f"queries/{task.partition:05d}.parquet", asked),
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
    """Return which events agree with a known one in user, item, time and kind."""
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
    newest = np.full(known.num_rows + 1, np.iinfo(np.int64).min)
    np.maximum.at(newest, np.repeat(np.arange(known.num_rows), lists.value_lengths().to_numpy()), lists.flatten().to_numpy())
    return newest


def _join(known: pa.Table, day: Sequences, rows_of_day: Integers) -> tuple[Sequences, Mask]:
    """Put the day's interactions behind each user's known ones; also tell which are the day's."""
    before = Sequences.from_table(known)
    parts = part_by_place(before.offsets, before.scalars["num_train"], before.scalars["num_validation"])
    before = replace(before, columns={**before.columns, _PART: parts}, scalars={})
    both = Sequences.join([before, day])
    user = np.arange(len(rows_of_day))
    is_new = user >= len(before)
    rows = np.stack([np.where(is_new, 0, user), len(before) + rows_of_day], axis=1).reshape(-1)  # a known row and the day's of each
    lengths = both.lengths[rows]
    lengths[::2][is_new] = 0
    pairs = both[rows].within(0, lengths)
    columns = {name: pairs.flat(name) for name in pairs.columns}
    return Sequences.of_offsets(columns, pairs.offsets[::2]), pairs.owners % 2 == 1


def _assign_parts(job: Job, everything: Sequences, is_day: Mask) -> Integers:
    """Return the part of each interaction: by the rule over a user's whole sequence, or, where parts are drawn, as it was or is drawn."""
    parts = everything.columns[_PART]
    if job.data.split != "random":
        was_trained_on = (parts == TRAINING) & ~is_day  # and is not held out any more
        parts = split_in_order(everything.columns["timestamps"], everything.offsets, job.data)
        parts[was_trained_on] = TRAINING
    return without_withheld(job, parts, everything)
