"""Assigns each interaction to training, validation or test, and draws the withheld items."""

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers, Mask
from recsys.config.data import DataConfig
from recsys.data.labels.withheld import draw, drawn
from recsys.schema import ITEM_ID, SPLIT, TIMESTAMP, USER_ID

TRAINING, VALIDATION, TEST, WITHHELD = range(4)
"""The part of an interaction; a withheld one is in none of the first three."""


def split_events(events: pa.Table, offsets: Integers, data: DataConfig, is_target: Mask | None = None) -> Integers:
    """Return the part of each event (EVENTS_SCHEMA, sorted by the tie rule); those of user u are `[offsets[u]:offsets[u + 1]]`.

    `is_target` marks the events of positive kinds; without it all are.

    column: as the log says. random: an event is held out by a draw that depends only on its user, item, time and the seed, so it is the
    same in every order, partition and version.
    """
    if data.split == "column":
        return np.asarray(events[SPLIT].to_numpy(), np.int64)
    if data.split != "random":
        return split_in_order(events[TIMESTAMP].to_numpy(), offsets, data, is_target)
    keys = zip(*(events[name].to_pylist() for name in (USER_ID, ITEM_ID, TIMESTAMP)), strict=True)
    draws = draw((f"{user} {item} {time}" for user, item, time in keys), data.split_seed)
    held_out = data.test_fraction + (1 - data.test_fraction) * data.validation_fraction
    return np.select([draws < data.test_fraction, draws < held_out], [TEST, VALIDATION], TRAINING)


def split_in_order(timestamps: Integers, offsets: Integers, data: DataConfig, is_target: Mask | None = None) -> Integers:
    """Return the part of each interaction by its place or its time.

    leave_one_out: test data begins with a user's last target and validation data with the target before it; a user with fewer than three
    interactions or two targets has only training data. time: validation begins with the first interaction at or after
    `validation_from`, test with the first at or after `test_from`; a late interaction of an appended version is held out if it comes
    after a held-out one.
    """
    lengths = np.diff(offsets)
    if data.split == "leave_one_out":
        last, before = _last_targets(offsets, np.ones(offsets[-1], bool) if is_target is None else is_target)
        is_held_out = (lengths >= 3) & (before >= 0)
        return part_by_place(offsets, np.where(is_held_out, before, lengths), np.where(is_held_out, last - before, 0))
    num_train = _leading_before(timestamps, offsets, data.validation_from)
    return part_by_place(offsets, num_train, _leading_before(timestamps, offsets, data.test_from) - num_train)


def _last_targets(offsets: Integers, is_target: Mask) -> tuple[Integers, Integers]:
    """Return the places of each user's last and last but one target, counted from the user's first interaction; -1 without one."""
    targets = np.flatnonzero(is_target)
    ends, begins = np.searchsorted(targets, offsets[1:]), np.searchsorted(targets, offsets[:-1])
    padded = np.append(targets, [0, 0])  # so that an index exists for users without targets
    last, before = (np.where(ends - begins >= back, padded[ends - back] - offsets[:-1], -1) for back in (1, 2))
    return last, before


def part_by_place(offsets: Integers, num_train: Integers, num_validation: Integers) -> Integers:
    """Return the part of each interaction of rows that hold training interactions first, then validation, then test."""
    lengths = np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    is_held_out, is_test = (place >= np.repeat(bound, lengths) for bound in (num_train, num_train + num_validation))
    return np.asarray(is_held_out.astype(np.int64) + is_test)


def _leading_before(timestamps: Integers, offsets: Integers, moment: int | None) -> Integers:
    """Count each user's interactions before the first one at or after the moment; 0 without a moment."""
    lengths = np.diff(offsets)
    if moment is None:
        return np.zeros_like(lengths)
    late = np.flatnonzero(timestamps >= moment)
    firsts = np.append(late, len(timestamps))[np.searchsorted(late, offsets[:-1])]
    return np.asarray(np.minimum(firsts - offsets[:-1], lengths), np.int64)


def withheld(item_ids: pa.Array | pa.ChunkedArray, data: DataConfig) -> Mask:
    """Return which items are kept out of training: a share of about `data.withheld_items`, each by its own draw."""
    return drawn("item", item_ids, data.withheld_items, data.split_seed)
