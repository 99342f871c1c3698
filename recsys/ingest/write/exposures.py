"""Exposures: which events are, what the user did with each, its part of the data, and its place in the user's history."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask
from recsys.config.data import DataConfig
from recsys.data.features.contexts import ContextSpace
from recsys.data.sequences import Sequences
from recsys.ingest.write.splits import TEST, TRAINING, VALIDATION, part_by_place, split_events
from recsys.schema import (
    DISPLAY_POSITION,
    EVENT,
    EXPOSURE_COLUMNS,
    IMPRESSION_ID,
    LABEL_PREFIX,
    SLICE_PREFIX,
    TIMESTAMP,
    Kind,
)

UNTAKEN = "exposure"
"""The kind of a row of which labels are known, none of them 1."""

_SHORT = tuple(name.removeprefix("exposed_") for name in EXPOSURE_COLUMNS)


def role_of_exposures(kinds: tuple[Kind, ...], data: DataConfig) -> str:
    """Return what the exposures of a log are: `label` for rows with labels, else a role: `exposure`, `negative`, or empty for none."""
    roles = {kind.role for kind in kinds}
    if "positive" not in roles:
        return ""
    return "label" if data.columns.labels else "exposure" if "exposure" in roles else "negative" if "negative" in roles else ""


def history_events(events: pa.Table, offsets: Integers, kinds: tuple[Kind, ...], data: DataConfig) -> tuple[pa.Table, Integers]:
    """Return the events that belong to histories, and where each user's begin; users may have none.

    With labels these are, for each label column, the rows where it is 1, as events of that kind; rows with only 0 are events of the
    kind UNTAKEN, if that is in histories.
    """
    if data.columns.labels:
        masks = {name: _is_positive(events, name) for name in data.columns.labels}
        if any(kind.name == UNTAKEN for kind in kinds):
            masks[UNTAKEN] = _has_label(events, data.columns.labels) & ~np.logical_or.reduce(list(masks.values()))
        rows = [np.flatnonzero(mask) for mask in masks.values()]
        names = pa.array(np.repeat(list(masks), [len(own) for own in rows]), pa.string())
        order = np.argsort(np.concatenate(rows), kind="stable")
        places = np.concatenate(rows)[order]
        chosen = events.take(pa.array(places))
        chosen = chosen.set_column(chosen.column_names.index(EVENT), EVENT, names.take(pa.array(order)))
        return chosen.combine_chunks(), np.searchsorted(places, offsets)
    if all(kind.in_history for kind in kinds):
        return events, offsets
    kept = pa.array([kind.name for kind in kinds if kind.in_history], pa.string())
    is_kept = pc.is_in(events[EVENT], value_set=kept)
    return events.filter(is_kept).combine_chunks(), np.concatenate([[0], np.cumsum(is_kept.to_numpy())])[offsets]


def labelled_kinds(data: DataConfig) -> tuple[str, ...]:
    """Return the event kinds that label columns give, weak to strong."""
    return ((UNTAKEN,) if data.kind(UNTAKEN).in_history else ()) + tuple(data.columns.labels)


def in_histories(events: pa.Table, data: DataConfig) -> pa.ChunkedArray:
    """Return which events belong to histories."""
    if data.columns.labels and data.kind(UNTAKEN).in_history:
        return pa.chunked_array([_has_label(events, data.columns.labels)])
    return is_interaction(events, data)


def label_kinds(events: pa.Table, names: Sequence[str]) -> Integers:
    """Return the number of the strongest of some kinds that each row has a label 1 of; that of UNTAKEN, or -1, without one."""
    kinds = np.full(events.num_rows, -1)
    if UNTAKEN in names:
        kinds[_has_label(events, [name for name in names if name != UNTAKEN])] = names.index(UNTAKEN)
    for number, name in enumerate(names):
        if name != UNTAKEN:
            kinds[_is_positive(events, name)] = number
    return kinds


def _has_label(events: pa.Table, names: Iterable[str]) -> Mask:
    return np.logical_or.reduce([events[f"{LABEL_PREFIX}{name}"].is_valid().to_numpy() for name in names])


def _is_positive(events: pa.Table, name: str) -> Mask:
    return np.asarray(pc.fill_null(pc.equal(events[f"{LABEL_PREFIX}{name}"], 1), False).to_numpy(), bool)


def is_interaction(events: pa.Table, data: DataConfig) -> pa.ChunkedArray:
    """Return which events count as interactions of their items: those with a positive label, else those of kinds in histories."""
    if data.columns.labels:
        return pa.chunked_array([np.logical_or.reduce([_is_positive(events, name) for name in data.columns.labels])])
    names = [name for name in pc.unique(events[EVENT]).to_pylist() if data.kind(name).in_history]
    return pc.is_in(events[EVENT], value_set=pa.array(names, pa.string()))


@dataclass(frozen=True)
class Exposures:
    """E exposures, sorted by user and time. Labels, and which of them are known, are bits by task."""

    users: Integers  # rows of the partition's users
    items: Integers
    times: Integers
    labels: Integers
    known: Integers
    displays: Integers  # 0: unknown
    contexts: Integers  # 0: unknown
    slices: pa.Array  # lists of `column=value`
    parts: Integers  # as drawn by a column or a hash; TRAINING where the user's history decides
    decided: Integers  # time of the last event that decides a label, else that of the exposure
    is_new: Mask  # False: held out by an earlier version

    def __getitem__(self, rows: Mask | Integers) -> "Exposures":
        places = np.flatnonzero(rows) if rows.dtype == bool else rows
        columns = {name: getattr(self, name)[places] for name in _ARRAYS}
        return replace(self, **columns, slices=self.slices.take(pa.array(places)))

    def joined(self, other: "Exposures") -> "Exposures":
        """Return both, sorted by user and time; of equal exposures, those of `self` stay."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        both = Exposures(**columns, slices=pa.concat_arrays([self.slices, other.slices]))
        keys = np.stack([both.users, both.items, both.times, both.displays], axis=1)
        first = np.unique(keys, axis=0, return_index=True)[1]
        both = both[np.sort(first)]
        return both[np.lexsort((both.times, both.users))]

    def placed(self, histories: Sequences, num_train: Integers, num_validation: Integers, data: DataConfig) -> tuple["Exposures", Integers]:
        """Return the exposures with their parts, and for each the number of interactions of its user's row before it.

        `histories` are the users' rows: training interactions first, then validation, then test. An exposure sees the longest beginning of
        the row that is older than itself, and nothing of a later part. It belongs to the part of the last event that decides its label.
        leave_one_out: what is decided after the last training interaction belongs to the validation data, what is decided after the
        validation target to the test data.
        """
        places = _num_older(histories, self.users, self.times)
        train, held_out = num_train[self.users], (num_train + num_validation)[self.users]
        parts = self.parts
        if data.split == "leave_one_out":
            has_held_out = histories.lengths[self.users] > train
            decided = _num_older(histories, self.users, self.decided)
            parts = np.where(~has_held_out | (decided < train), TRAINING, np.where(decided < held_out, VALIDATION, TEST))
        elif data.split == "time":
            assert data.validation_from is not None
            assert data.test_from is not None
            parts = (self.decided >= data.validation_from).astype(np.int64) + (self.decided >= data.test_from)
        limits = np.select([parts == TRAINING, parts == VALIDATION], [train, held_out], histories.lengths[self.users])
        return replace(self, parts=parts), np.minimum(places, limits)

    def with_places(self, histories: Sequences, places: Integers, contexts: ContextSpace, has_time: bool) -> "Exposures":
        """Return the exposures, of which the new ones have what follows from their place in the history in their contexts."""
        before = np.append(histories.columns["timestamps"], 0)[histories.starts[self.users] + places - 1]
        codes = contexts.encode_places(places, self.times - before if has_time else None)
        return replace(self, contexts=self.contexts | np.where(self.is_new, codes, 0))

    def sequences(self, places: Integers, num_users: int) -> Sequences:
        """Return the exposures as one row per user."""
        numbers = (self.items, places, self.labels, self.known, self.displays)
        columns = {name: column.astype(np.int32) for name, column in zip(_SHORT[:-1], numbers, strict=True)} | {"contexts": self.contexts}
        return Sequences.of_offsets(columns, np.searchsorted(self.users, np.arange(num_users + 1)))


_ARRAYS = tuple(field.name for field in fields(Exposures) if field.name != "slices")


def _num_older(histories: Sequences, users: Integers, times: Integers) -> Integers:
    """Return the length of the longest beginning of each user's row whose interactions are all older than a time."""
    distinct, ranks = np.unique(np.concatenate([histories.timestamps, times]), return_inverse=True)  # small numbers: no overflow below
    own, asked, span = ranks[: len(ranks) - len(times)], ranks[len(ranks) - len(times) :], len(distinct) + 1
    newest = np.maximum.accumulate(histories.owners * span + own)  # within a row: the newest time so far
    return np.asarray(np.searchsorted(newest, users * span + asked, side="left") - histories.offsets[users])


def find_exposures(
    events: pa.Table, offsets: Integers, user_of: Integers, columns: Mapping[str, Integers], kinds: tuple[Kind, ...], data: DataConfig
) -> Exposures:
    """Find the exposures among the events of a partition, and label them by what the user did.

    Args:
        offsets: where each user's events begin.
        user_of: (U,) the row of each of these users.
        columns: `items` (N,), the item index of each event, and `contexts` (N,).
    """
    items = columns["items"].astype(np.int64)
    role = role_of_exposures(kinds, data)
    owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    times, displays = events[TIMESTAMP].to_numpy(), np.zeros(events.num_rows, np.int64)
    if DISPLAY_POSITION in events.column_names:
        displays = pc.fill_null(events[DISPLAY_POSITION], 0).to_numpy().astype(np.int64).clip(min=0)
    decided, parts = times.copy(), np.full(events.num_rows, TRAINING)
    if data.split in ("random", "column"):
        parts = split_events(events, offsets, data)
    if role == "label":
        labels, known = _given_labels(events, [kind.name for kind in kinds if kind.is_target])
        is_exposure = known > 0
    else:
        numbers = {kind.name: number for number, kind in enumerate(kinds)}
        encoded = events[EVENT].combine_chunks().dictionary_encode()
        kind_of = np.array([numbers[name] for name in encoded.dictionary.to_pylist()], np.int64)[encoded.indices.to_numpy()]
        is_exposure = np.array([kind.role == role for kind in kinds])[kind_of]
        tasks = [number for number, kind in enumerate(kinds) if kind.is_target]
        known = np.full(events.num_rows, (1 << len(tasks)) - 1)
        labels = np.zeros(events.num_rows, np.int64)
        if role == "exposure":
            shown = _attribute(events, owners, items, times, is_exposure, data.exposure_seconds)
            joined = np.flatnonzero(shown >= 0)
            np.maximum.at(decided, shown[joined], times[joined])
            np.maximum.at(parts, shown[joined], parts[joined])  # an answer that is held out may not be trained on
            is_taken = (shown >= 0) & np.array([kind.is_target for kind in kinds])[kind_of]
            for bit, task in enumerate(tasks):
                reached = np.flatnonzero(is_taken & (kind_of >= task))
                labels[shown[reached]] |= 1 << bit
    rows = np.flatnonzero(is_exposure)
    chosen = events.take(pa.array(rows))
    found = Exposures(
        user_of[owners[rows]],
        items[rows],
        times[rows],
        labels[rows],
        known[rows],
        displays[rows],
        columns["contexts"][rows],
        _slices(chosen, data),
        parts[rows],
        decided[rows],
        np.ones(len(rows), bool),
    )
    return found[np.lexsort((found.times, found.users))]


def _given_labels(events: pa.Table, names: Sequence[str]) -> tuple[Integers, Integers]:
    labels, known = np.zeros((2, events.num_rows), np.int64)
    for bit, name in enumerate(names):
        column = events[f"{LABEL_PREFIX}{name}"]
        labels |= pc.fill_null(column, 0).to_numpy().astype(np.int64) << bit
        known |= column.is_valid().to_numpy().astype(np.int64) << bit
    return labels, known


def _attribute(events: pa.Table, owners: Integers, items: Integers, times: Integers, is_exposure: Mask, seconds: int) -> Integers:
    """Return for each event the row of the exposure that it belongs to, or -1.

    It is the exposure of the user and item with the same impression id or, if one of the two has none, the last exposure at most `seconds`
    before.
    """
    impressions = np.full(len(owners), -1)
    if IMPRESSION_ID in events.column_names:
        impressions = pc.fill_null(events[IMPRESSION_ID].combine_chunks().dictionary_encode().indices, -1).to_numpy().astype(np.int64)
    # In this order the exposures of a user and item precede what happens at the same time, and impression ids are together or absent.
    found = np.full(len(owners), -1)
    order = np.lexsort((~is_exposure, times, items, owners))
    last = np.maximum.accumulate(np.where(is_exposure[order], np.arange(len(order)), -1))
    shown = np.where(last >= 0, order[last], -1)
    is_same = (shown >= 0) & (owners[shown] == owners[order]) & (items[shown] == items[order]) & (times[order] - times[shown] <= seconds)
    differs = (impressions[shown] >= 0) & (impressions[order] >= 0) & (impressions[shown] != impressions[order])
    found[order] = np.where(is_same & ~differs, shown, -1)
    if (impressions >= 0).any():
        exposed = np.flatnonzero(is_exposure & (impressions >= 0))
        keys = pa.table([owners, items, impressions], ["user", "item", "impression"])
        numbers = keys.append_column("row", pa.array(np.arange(len(owners))))
        firsts = numbers.take(pa.array(exposed)).group_by(["user", "item", "impression"], use_threads=False).aggregate([("row", "min")])
        joined = numbers.filter(pa.array(impressions >= 0)).join(
            firsts, ["user", "item", "impression"], join_type="inner", use_threads=False
        )
        found[joined["row"].to_numpy()] = joined["row_min"].to_numpy()
    return np.where(is_exposure, -1, found)


def _slices(events: pa.Table, data: DataConfig) -> pa.Array:
    """Return for each event a list of `column=value`."""
    texts = [
        pc.binary_join_element_wise(name, pc.fill_null(events[f"{SLICE_PREFIX}{name}"], "unknown"), "=").combine_chunks()
        for name in data.columns.slices
    ]
    offsets = pa.array(np.arange(events.num_rows + 1) * len(texts), pa.int32())
    order = np.arange(events.num_rows * len(texts)).reshape(len(texts), -1).T.reshape(-1) if texts else np.zeros(0, np.int64)
    values = pa.concat_arrays(texts).take(pa.array(order)) if texts else pa.array([], pa.string())
    return pa.ListArray.from_arrays(offsets, values)


def known_exposures(known: pa.Table) -> Exposures | None:
    """Return the held-out exposures in the base's rows of users, whose rows come first; None if the base has no exposures."""
    if "exposed_times" not in known.column_names:
        return None
    lists = {name: known[name].combine_chunks() for name in (*EXPOSURE_COLUMNS, "exposed_times", "exposed_slices")}
    lengths = lists["exposed_times"].value_lengths().to_numpy().astype(np.int64)
    num_validation = known["num_validation_exposures"].to_numpy().astype(np.int64)
    parts = part_by_place(np.concatenate([[0], np.cumsum(lengths)]), np.zeros_like(lengths), num_validation)
    flat = {name: column.flatten() for name, column in lists.items()}
    numbers = {name: column.to_numpy().astype(np.int64) for name, column in flat.items() if name != "exposed_slices"}
    return Exposures(
        np.repeat(np.arange(known.num_rows), lengths),
        numbers["exposed_items"],
        numbers["exposed_times"],
        numbers["exposed_labels"],
        numbers["exposed_known"],
        numbers["exposed_displays"],
        numbers["exposed_contexts"],
        flat["exposed_slices"],
        parts,
        numbers["exposed_times"],
        np.zeros(int(lengths.sum()), bool),
    )


def held_out_columns(exposures: Exposures, places: Integers, num_users: int) -> list[pa.Array]:
    """Return the columns of users' tables for held-out exposures: validation first, then test, each oldest first."""
    order = np.lexsort((exposures.times, exposures.parts, exposures.users))
    own, places = exposures[order], places[order]
    offsets = pa.array(np.searchsorted(own.users, np.arange(num_users + 1)), pa.int32())
    numbers: list[NDArray[np.int64]] = [own.items, places, own.labels, own.known, own.displays]
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column, pa.int32())) for column in numbers]
    contexts, times = (pa.ListArray.from_arrays(offsets, pa.array(column, pa.int64())) for column in (own.contexts, own.times))
    slices = pa.ListArray.from_arrays(offsets, own.slices)
    num_validation = np.bincount(own.users[own.parts == VALIDATION], minlength=num_users)
    return [*lists, contexts, times, slices, pa.array(num_validation, pa.int32())]
