"""Builds the rows of the users and training shards from users' interactions."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers
from recsys.config.data import DataConfig
from recsys.data.sequences import Sequences, cut_windows
from recsys.ingest.write.splits import TRAINING, VALIDATION, WITHHELD
from recsys.schema import CONTEXTS, EXPOSURE_COLUMNS, SEQUENCE_COLUMNS, TRAIN_SCHEMA, RowParts, train_schema, users_schema


def by_part(users: Sequences, parts: Integers) -> tuple[Sequences, Integers, Integers]:
    """Put each user's training interactions first, then validation, then test, keeping the order within each part.

    `parts` (N,) is the part of each interaction; withheld ones are dropped. Also returns each user's number of training and of
    validation interactions.
    """
    cells = users.owners * (WITHHELD + 1) + parts
    counts = np.bincount(cells, minlength=len(users) * (WITHHELD + 1)).reshape(len(users), WITHHELD + 1)
    order = np.argsort(cells, kind="stable")
    order = order[parts[order] != WITHHELD]
    columns = {name: users.flat(name)[order] for name in users.columns}
    offsets = np.concatenate([[0], np.cumsum(counts[:, :WITHHELD].sum(axis=1))])
    return Sequences.of_offsets(columns, offsets), counts[:, TRAINING], counts[:, VALIDATION]


def users_table(
    users: Sequences,
    user_indices: Integers,
    user_ids: pa.Array | pa.ChunkedArray,
    num_train: Integers,
    num_validation: Integers,
    attributes: pa.Array | pa.ChunkedArray,
    held_out: Sequence[pa.Array] = (),
) -> pa.Table:
    """Build one row per user (`users_schema`); `held_out` are the columns of held-out exposures, if the log has exposures."""
    counts = (pa.array(counts, pa.int32()) for counts in (num_train, num_validation))
    columns = [pa.array(user_indices, pa.int64()), user_ids, *_lists(users), *counts, attributes, *_situations(users), *held_out]
    return pa.table(columns, schema=users_schema(_parts(users, bool(held_out))))


def train_table(
    users: Sequences,
    user_indices: Integers,
    first_targets: Integers,
    num_train: Integers,
    data: DataConfig,
    exposures: Sequences | None = None,
) -> pa.Table:
    """Cut each user's training part into samples (`train_schema`); targets begin at the user's entry in `first_targets`."""
    scalars = {"user_index": user_indices, "first_target": first_targets}
    training = replace(users.within(0, num_train), scalars=scalars, exposures=exposures)
    strides = np.full(len(users), data.window_stride or data.max_history)
    samples = cut_windows(training, data.max_history, strides, data.max_exposures)
    user_index, first_target = (pa.array(samples.scalars[name], TRAIN_SCHEMA.field(name).type) for name in ("user_index", "first_target"))
    shown = [] if samples.exposures is None else _exposure_lists(samples.exposures)
    columns = [user_index, *_lists(samples), first_target, *_situations(samples), *shown]
    return pa.table(columns, schema=train_schema(_parts(samples, samples.exposures is not None)))


def _parts(rows: Sequences, has_exposures: bool) -> RowParts:
    return RowParts(has_exposures, CONTEXTS in rows.columns, rows.profiles is not None)


def _situations(rows: Sequences) -> list[pa.Array]:
    """Return the columns of contexts and profiles, as far as there are any."""
    contexts = [_list(rows, CONTEXTS)] if CONTEXTS in rows.columns else []
    return contexts + ([] if rows.profiles is None else profile_lists(rows.profiles))


def profile_lists(profiles: Sequences) -> list[pa.Array]:
    """Return the PROFILE_COLUMNS of profiles."""
    numbers = profiles.scalars["numbers"]
    offsets = pa.array(np.arange(len(profiles) + 1) * numbers.shape[1], pa.int32())
    return [_list(profiles, "categories"), pa.ListArray.from_arrays(offsets, pa.array(numbers.reshape(-1), pa.float32()))]


def _exposure_lists(exposures: Sequences) -> list[pa.Array]:
    return [_list(exposures, name.removeprefix("exposed_")) for name in EXPOSURE_COLUMNS]


def _lists(sequences: Sequences) -> list[pa.Array]:
    return [_list(sequences, name) for name in SEQUENCE_COLUMNS if name != CONTEXTS]


def _list(sequences: Sequences, name: str) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(sequences.offsets, pa.int32()), pa.array(sequences.flat(name)))
