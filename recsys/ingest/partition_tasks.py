"""Tasks over user partitions: merge the cleaned events, filter by k-core, write the shards."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask
from recsys.data.features.contexts import ContextSpace, normalized
from recsys.data.features.profiles import ProfileSpace
from recsys.data.labels.withheld import withheld_users
from recsys.data.sequences import Sequences
from recsys.ingest.append import KNOWN_INDEX_NAME, PART, assign_parts, is_known, join_known, known_users, listed_attributes, newest_times
from recsys.ingest.clean.cleaning import collapse_chains, drop_bots, notice_order, sort_and_deduplicate
from recsys.ingest.clean.id_overlap import Overlap
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.input_tasks import ATTRIBUTES, STAGED_USERS
from recsys.ingest.job import Job, Partition, Written
from recsys.ingest.shuffle import read_partition, read_table, write_table
from recsys.ingest.situations import count_values
from recsys.ingest.sources.formats import INPUT_ORDER
from recsys.ingest.write.exposures import (
    find_exposures,
    held_out_columns,
    history_events,
    in_histories,
    is_interaction,
    known_exposures,
    label_kinds,
    role_of_exposures,
)
from recsys.ingest.write.feature_statistics import Moments, read_histories
from recsys.ingest.write.report_counts import Limits
from recsys.ingest.write.sequence_tables import by_part, profile_lists, train_table, users_table
from recsys.ingest.write.splits import TRAINING, WITHHELD, split_events, withheld
from recsys.schema import (
    CONTEXT_PREFIX,
    CONTEXTS,
    COUNTS_SCHEMA,
    EVENT,
    ITEM_ID,
    LISTED_SCHEMA,
    QUERIES_SCHEMA,
    QUERY,
    TIMESTAMP,
    USER_ID,
    VALUE,
    Kind,
)

ITEM_INDEX_NAME = "item_index.parquet"
IS_WITHHELD = "is_withheld"


def merge_events(job: Job, partition: int) -> Partition:
    """Gather one partition from the pieces, sorted by the tie rule, and stage it as generation 0.

    Duplicates, bots and, in an appended version, events that the base already has are dropped and counted.
    """
    rejects, noticed = Rejects(), Counter[str]()
    pieces = read_partition(job.storage, job.staging("pieces"), partition, job.events_schema)
    distinct, _ = sort_and_deduplicate(pieces)
    rejects.add_missing("duplicate", pieces, distinct)
    human, _ = drop_bots(distinct, job.data.cleaning.max_events_per_minute if job.has_time else None)
    rejects.add_missing("bot", distinct, human)
    events = collapse_chains(human, job.data)
    rejects.add_missing("collapsed", human, events)
    known = known_users(job.base, partition, events[USER_ID])
    num_new_users = pc.count_distinct(events[USER_ID]).as_py() - known.num_rows
    if job.base is not None:
        events, noticed["late"] = _drop_known(job, job.base.manifest.event_kinds, known, events, rejects)
    merged = _stage_generation(job, 0, partition, events, rejects)
    return merged.model_copy(update={"num_users": num_new_users, "noticed": notice_order(events) + noticed})


def _drop_known(job: Job, event_kinds: tuple[str, ...], known: pa.Table, events: pa.Table, rejects: Rejects) -> tuple[pa.Table, int]:
    """Drop events that the base already has; return the others, and how many of them are older than the user's newest known event."""
    columns = index_events(job, events, event_kinds, KNOWN_INDEX_NAME)
    if job.data.columns.labels:
        columns["events"] = label_kinds(events, event_kinds)
    owners = pc.fill_null(pc.index_in(events[USER_ID], value_set=known[USER_ID].combine_chunks()), -1).to_numpy().astype(np.int64)
    is_old = is_known(owners, columns, known)
    newest = newest_times(known)[owners]
    # The base's rows lack withheld interactions, so an event that is not newer than the known ones may be one of them.
    is_out = ~is_old & (columns["timestamps"] <= newest) & withheld(events[ITEM_ID], job.data)
    is_fresh = ~is_old & ~is_out
    unknown, fresh = events.filter(pa.array(~is_old)), events.filter(pa.array(is_fresh)).combine_chunks()
    rejects.add_missing("known", events, unknown)
    rejects.add_missing("withheld", unknown, fresh)
    return fresh, int((is_fresh & (columns["timestamps"] < newest)).sum())


def core_round(job: Job, generation: int, partition: int) -> Partition:
    """Drop the items that did not survive, then the users left with fewer than k_core interactions."""
    before = read_table(job.storage, job.staged("events", generation - 1, partition))
    survivors = read_table(job.storage, job.staged("survivors", generation, 0))[ITEM_ID].combine_chunks()
    of_items = before.filter(pc.is_in(before[ITEM_ID], value_set=survivors))
    counts = of_items.filter(is_interaction(of_items, job.data)).group_by(USER_ID, use_threads=False).aggregate([(ITEM_ID, "count")])
    active = counts.filter(pc.greater_equal(counts[f"{ITEM_ID}_count"], job.data.k_core))[USER_ID].combine_chunks()
    after = of_items.filter(pc.is_in(of_items[USER_ID], value_set=active))
    rejects = Rejects()
    rejects.add_missing("k_core_item", before, of_items)
    rejects.add_missing("k_core_user", of_items, after)
    return _stage_generation(job, generation, partition, after, rejects)


def _stage_generation(job: Job, generation: int, partition: int, events: pa.Table, rejects: Rejects) -> Partition:
    """Stage one partition's events and the number of interactions of each item that occurs in them."""
    write_table(job.storage, job.staged("events", generation, partition), events)
    rows = pa.table([events[ITEM_ID], is_interaction(events, job.data).cast(pa.int64())], [ITEM_ID, "count"])
    counts = rows.group_by(ITEM_ID, use_threads=False).aggregate([("count", "sum")]).rename_columns([ITEM_ID, "count"])
    write_table(job.storage, job.staged("items", generation, partition), counts)
    return Partition(
        rows=events.num_rows,
        rejected=rejects,
        examples=rejects.examples,
        num_users=pc.count_distinct(events[USER_ID]).as_py(),
        num_queries=pc.count_distinct(events[QUERY].filter(in_histories(events, job.data))).as_py(),
        event_kinds=tuple(sorted(pc.unique(events[EVENT]).to_pylist())),
        contexts={name: tuple(count_values(normalized(events[f"{CONTEXT_PREFIX}{name}"]))) for name in job.data.columns.context},
    )


@dataclass(frozen=True)
class WriteTask:
    """One partition to write as shards; its new users and queries are numbered from `first_user` and `first_query`."""

    partition: int
    generation: int
    first_user: int
    first_query: int
    kinds: tuple[Kind, ...]
    profiles: ProfileSpace
    contexts: ContextSpace


def write_shards(job: Job, task: WriteTask) -> Written:
    """Write one partition's users, training samples and queries, and stage its training counts by item.

    An appended version writes complete rows of the users with new events, and only samples with new targets.
    """
    everyone = read_table(job.storage, job.staged("events", task.generation, task.partition)).combine_chunks()
    all_offsets = _user_offsets(everyone[USER_ID])
    active_ids = everyone[USER_ID].take(pa.array(all_offsets[:-1]))
    names = [kind.name for kind in task.kinds]
    is_target = np.array([kind.is_target for kind in task.kinds])
    events, offsets = history_events(everyone, all_offsets, task.kinds, job.data)
    known = known_users(job.base, task.partition, active_ids)
    known_ids = known[USER_ID].combine_chunks()
    new_ids = active_ids.filter(pc.invert(pc.is_in(active_ids, value_set=known_ids))).combine_chunks()
    user_ids = pa.concat_arrays([known_ids, new_ids])
    user_indices = np.concatenate([known["user_index"].to_numpy(), task.first_user + np.arange(len(new_ids))])
    queries, asked = _number_queries(events, task.first_query)
    columns = index_events(job, events, tuple(names)) | {"queries": queries}
    if task.contexts:
        columns[CONTEXTS] = _context_codes(job, events, task.contexts)
    columns[PART] = split_events(events, offsets, job.data, is_target[columns["events"]])
    new_rows = pc.index_in(user_ids, value_set=active_ids.combine_chunks()).to_numpy()
    everything, is_new = join_known(known, Sequences.of_offsets(columns, offsets), new_rows)
    if task.contexts.reads_places:
        _add_places(job, everything, is_new, task.contexts)
    parts = assign_parts(everything, is_new, job.data, is_target[everything.columns["events"]])
    is_withheld = withheld_users(user_ids, job.data.withheld_users, job.data.split_seed)
    is_out = staged_withheld(job)[everything.columns["items"] - 1] | is_withheld[everything.owners]
    parts = np.where((parts == TRAINING) & is_out, WITHHELD, parts)
    sequences, num_train, num_validation = by_part(everything, parts)
    attributes, listed, overlap = _staged_attributes(job, task.partition, user_ids, known[ATTRIBUTES].combine_chunks())
    if task.profiles:
        sequences = replace(sequences, profiles=task.profiles.encode([dict(own or []) for own in attributes.to_pylist()]))
    rows = sequences, num_train, num_validation
    shown, held_out, num_exposures = _write_exposures(job, task, everyone, all_offsets, new_rows, known, rows, is_withheld)
    first_targets = np.bincount(everything.owners[(parts == TRAINING) & ~is_new], minlength=len(user_ids)).clip(min=shown is None)
    users = users_table(sequences, user_indices, user_ids, num_train, num_validation, attributes, held_out)
    train = train_table(sequences, user_indices, first_targets, num_train, job.data, shown)
    values = sequences.within(0, num_train).values.astype(np.float64)
    moments = Moments.of(values, np.zeros_like(values, np.int64), 1)
    num_trained = np.concatenate([known["num_train"].to_numpy().astype(np.int64), np.zeros(len(new_ids), np.int64)])
    new_training, targets = sequences.within(num_trained, num_train), sequences.within(first_targets, num_train)
    counts = np.unique(new_training.items[is_target[new_training.events]], return_counts=True)
    write_table(job.storage, job.staged("train-counts", 0, task.partition), pa.table(list(counts), schema=COUNTS_SCHEMA))
    return Written(
        rows=everyone.num_rows,
        num_interactions=events.num_rows,
        rejected=listed,
        examples=listed.examples,
        users=job.write_shard(f"users/{task.partition:05d}.parquet", users),
        train=job.write_shard(f"train/{task.partition:05d}.parquet", train),
        queries=job.write_shard(f"queries/{task.partition:05d}.parquet", asked),
        listed=job.write_shard(f"listed/{task.partition:05d}.parquet", _listed_users(job, task, user_ids)),
        num_exposures=num_exposures,
        num_targets=int(is_target[targets.events].sum()),
        withheld=int((parts == WITHHELD).sum()),
        overlap=overlap,
        value_moments=(int(moments.count[0]), float(moments.mean[0]), float(moments.deviations[0])),
        limits=Limits.of(read_histories(users), job.has_time),
    )


def _write_exposures(
    job: Job,
    task: WriteTask,
    events: pa.Table,
    offsets: Integers,
    new_rows: Integers,
    known: pa.Table,
    rows: tuple[Sequences, Integers, Integers],
    is_withheld: Mask,
) -> tuple[Sequences | None, list[pa.Array], int]:
    """Return the exposures of the training data by user, the columns of those held out, and the number of the former.

    `rows` are the users' sequences with their numbers of training and validation interactions, `is_withheld` which users are kept out of
    training; `new_rows` as in `join_known`.
    """
    if not role_of_exposures(task.kinds, job.data):
        return None, [], 0
    histories, num_train, num_validation = rows
    columns = index_events(job, events, ()) | {CONTEXTS: _context_codes(job, events, task.contexts)}
    found = find_exposures(events, offsets, np.argsort(new_rows), columns, task.kinds, job.data)
    before = known_exposures(known)
    found = found if before is None else before.joined(found)
    found, places = found.placed(histories, num_train, num_validation, job.data)
    if task.contexts.reads_places:
        found = found.with_places(histories, places, task.contexts, job.has_time)
    is_trained = (found.parts == TRAINING) & found.is_new & ~staged_withheld(job)[found.items - 1] & ~is_withheld[found.users]
    is_held_out = found.parts != TRAINING
    held_out = held_out_columns(found[is_held_out], places[is_held_out], len(histories))
    return found[is_trained].sequences(places[is_trained], len(histories)), held_out, int(is_trained.sum())


def index_events(job: Job, events: pa.Table, event_kinds: tuple[str, ...], index_name: str = ITEM_INDEX_NAME) -> dict[str, NDArray[Any]]:
    """Convert staged events to columns of `Sequences` by a staged item index; an unknown item becomes 0, an unknown kind -1."""
    ids = read_table(job.storage, job.staging(index_name))[ITEM_ID].combine_chunks()
    return {
        "items": pc.fill_null(pc.index_in(events[ITEM_ID], value_set=ids), -1).to_numpy().astype(np.int32) + 1,
        "events": pc.fill_null(pc.index_in(events[EVENT], value_set=pa.array(event_kinds, pa.string())), -1).to_numpy().astype(np.int8),
        "timestamps": events[TIMESTAMP].to_numpy(),
        "values": events[VALUE].to_numpy(),
    }


def _listed_users(job: Job, task: WriteTask, user_ids: pa.Array) -> pa.Table:
    """Return the profiles of the users in the users table who have no event in this or an older version (LISTED_SCHEMA)."""
    if not task.profiles:
        return LISTED_SCHEMA.empty_table()
    staged = read_partition(job.storage, job.staging("user-pieces"), task.partition, STAGED_USERS).combine_chunks()
    ids = staged[USER_ID].combine_chunks()
    active = pa.concat_arrays([user_ids, known_users(job.base, task.partition, staged[USER_ID])[USER_ID].combine_chunks()])
    is_first = pc.equal(pc.index_in(ids, value_set=ids), pa.array(np.arange(len(ids)), pa.int32()))
    chosen = staged.filter(pc.and_not(is_first, pc.is_in(ids, value_set=active)))
    profiles = task.profiles.encode([dict(own or []) for own in chosen[ATTRIBUTES].to_pylist()])
    return pa.table([chosen[USER_ID], chosen[ATTRIBUTES], *profile_lists(profiles)], schema=LISTED_SCHEMA)


def _context_codes(job: Job, events: pa.Table, contexts: ContextSpace) -> Integers:
    """Return the context of each event, without that of its place in the history; 0 in a dataset without contexts."""
    given = {name: events[f"{CONTEXT_PREFIX}{name}"] for name in contexts.given if f"{CONTEXT_PREFIX}{name}" in events.column_names}
    return contexts.encode(events[TIMESTAMP].to_numpy() if job.has_time else None, given, events.num_rows)


def _add_places(job: Job, rows: Sequences, is_new: Mask, contexts: ContextSpace) -> None:
    """Add what follows from the place in the history to the contexts of new interactions, in place."""
    gaps = np.diff(rows.columns["timestamps"], prepend=0) if job.has_time else None
    rows.columns[CONTEXTS][is_new] |= contexts.encode_places(rows.positions, gaps)[is_new]


def staged_withheld(job: Job) -> Mask:
    """Return for each item, by item index - 1, whether it is kept out of training."""
    column = read_table(job.storage, job.staging(ITEM_INDEX_NAME), [IS_WITHHELD])[IS_WITHHELD]
    return np.asarray(column.to_numpy(), bool)


def _number_queries(events: pa.Table, first: int) -> tuple[NDArray[np.int32], pa.Table]:
    """Number the distinct queries from `first` on; return each event's index (0: no query) and the table of texts (QUERIES_SCHEMA)."""
    encoded = events[QUERY].combine_chunks().dictionary_encode()
    indices = pc.fill_null(pc.add(encoded.indices, first), 0).to_numpy().astype(np.int32)
    numbers = pa.array(first + np.arange(len(encoded.dictionary)), pa.int32())
    return indices, pa.table([numbers, encoded.dictionary], schema=QUERIES_SCHEMA)


def _user_offsets(user_ids: pa.ChunkedArray) -> Integers:
    """Return where each user begins in a column sorted by user, and where the last one ends."""
    codes = user_ids.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.concatenate([np.flatnonzero(np.diff(codes, prepend=-1)), [len(codes)]]).astype(np.int64)


def _staged_attributes(job: Job, partition: int, user_ids: pa.Array, known: pa.Array) -> tuple[pa.ChunkedArray, Rejects, Overlap]:
    """Return each user's attributes, the rejected rows of the users table, and its overlap with the users of the events.

    A user who is not in the table keeps the attributes in `known`, whose rows belong to the first of `user_ids`, or of an older table.
    """
    staged = read_partition(job.storage, job.staging("user-pieces"), partition, STAGED_USERS)
    ids = staged[USER_ID].combine_chunks()
    listed = listed_attributes(job.base, partition, user_ids.slice(len(known)))
    # index_in finds the first row of an id, which is the first by input order, since pieces are read in that order.
    rows = pc.index_in(user_ids, value_set=ids)
    chosen = pc.if_else(rows.is_valid(), rows, pa.array(np.arange(staged.num_rows, staged.num_rows + len(user_ids)), pa.int32()))
    rejects = Rejects()
    is_later = pc.less(pc.index_in(ids, value_set=ids), pa.array(np.arange(len(ids)), pa.int32()))
    rejects.add("user_duplicate", pa.chunked_array([is_later]), staged[INPUT_ORDER], staged[USER_ID])
    overlap = Overlap.of(pc.unique(user_ids), pc.unique(ids)) if len(ids) else Overlap()
    return pa.chunked_array([staged[ATTRIBUTES].combine_chunks(), known, listed]).take(chosen), rejects, overlap
