"""The users of an evaluation, which are those with a target in the split."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask
from recsys.config.evaluation import EvaluationConfig
from recsys.data.labels.seen import SeenRule
from recsys.data.labels.withheld import withheld_users
from recsys.data.manifest import USER_INDEX, Dataset, DatasetManifest
from recsys.data.sequences import ASKED, HISTORY_COLUMNS, Sequences
from recsys.errors import UserError
from recsys.schema import CONTEXTS, PROFILE_COLUMNS, USER_ID

COUNTS = ("in_split", "other_kind", "no_history", "seen_before", "counted")
"""What `TargetRules` counts: the interactions of a split, the reasons why some are no targets, and the targets."""

_COLUMNS = [USER_INDEX, *HISTORY_COLUMNS, "queries", "num_train", "num_validation", "attributes"]


@dataclass(frozen=True)
class EvaluationUser:
    """One user's history before the split, with profile and the context of the first target, and the targets in the split that count.

    `seen` are the items that are no candidates. `query` is the index of the query typed before the first target, 0 for none.
    """

    user_index: int
    history: Sequences
    targets: Sequences
    seen: Integers  # sorted
    attributes: dict[str, str]
    query: int


@dataclass(frozen=True)
class TargetRules:
    """Which interactions of a split count as targets, and which items a user has seen.

    `counts` counts the interactions of the split: `in_split`, the reasons why some do not count, and `counted`.
    """

    seen: SeenRule
    kinds: Mask  # (kinds,)
    repeats: Literal["exclude", "include", "new_kind"]
    counts: Counter[str]

    @classmethod
    def of(cls, manifest: DatasetManifest, config: EvaluationConfig) -> "TargetRules":
        """Read the rules from the config.

        Raises:
            UserError: `evaluation.target_events` names a kind that the dataset does not have in its histories.
        """
        possible = [kind.name for kind in manifest.kind_table if kind.in_history]
        for name in config.target_events:
            if name not in possible:
                known = ", ".join(possible)
                raise UserError(f"evaluation.target_events: '{name}' is not an event kind of the dataset's histories; known: {known}")
        chosen = [kind.name in config.target_events if config.target_events else kind.is_target for kind in manifest.kind_table]
        return cls(SeenRule(manifest), np.array(chosen), config.repeats, Counter(dict.fromkeys(COUNTS, 0)))

    def apply(self, history: Sequences, later: Sequences) -> tuple[Integers, Integers]:
        """Return the places of the interactions that count among those in the split, and the user's seen items; counts both."""
        items, events = later.items, later.events
        is_kind = self.kinds[events]
        self.counts.update(in_split=len(items), other_kind=int((~is_kind).sum()))
        if not is_kind.any() or not len(history.items):
            self.counts["no_history"] += int(is_kind.sum())
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        seen = self.seen(history, int(later.timestamps[0]))
        if self.repeats == "include":
            counts, seen = is_kind, np.zeros(0, np.int64)
        else:
            is_seen = np.isin(items, seen)
            if self.repeats == "new_kind":
                is_seen &= ~_is_stronger(history, items, events)
            counts = is_kind & ~is_seen
            seen = np.setdiff1d(seen, items[counts])
        self.counts.update(seen_before=int((is_kind & ~counts).sum()), counted=int(counts.sum()))
        return np.flatnonzero(counts), seen

    def apply_new(self, later: Sequences) -> tuple[Integers, Integers]:
        """Return the places of the interactions that count for a user without history, and no seen items; counts nothing."""
        return np.flatnonzero(self.kinds[later.events]), np.zeros(0, np.int64)


def _is_stronger(history: Sequences, items: Integers, events: Integers) -> Mask:
    """Return which events are of a stronger kind than any event of the history on the same item."""
    distinct, places = np.unique(np.concatenate([history.items, items]), return_inverse=True)
    before = np.full(len(distinct), -1)
    np.maximum.at(before, places[: len(history.items)], history.events)
    return np.asarray(events > before[places[len(history.items) :]])


def read_evaluation_users(dataset: Dataset, split: str, config: EvaluationConfig | None = None) -> list[EvaluationUser]:
    """Read the users with a target in the split, by `evaluation.target_events` and `evaluation.repeats`.

    Raises:
        UserError: there is no such user, or no such event kind.
    """
    return list(find_users(dataset, split, TargetRules.of(dataset.manifest, config or EvaluationConfig())))


def find_users(dataset: Dataset, split: str, rules: TargetRules) -> Iterator[EvaluationUser]:
    """Read the users like `read_evaluation_users`, shard by shard; the first is found at once.

    Raises:
        UserError: there is no such user.
    """
    users = _find(dataset, split, rules)
    first = next(users, None)
    if first is None:
        found = ", ".join(f"{count} {name}" for name, count in rules.counts.items() if count) or "no interaction in the split"
        raise UserError(
            f"{dataset.uri}: no user has a {split} target that they have not seen before ({found}); with data.split = leave_one_out users "
            "need 3 interactions, with 'time' some after data.validation_from and data.test_from; evaluation.repeats='new_kind' counts "
            "stronger events on seen items"
        )
    return chain([first], users)


def find_new_users(dataset: Dataset, split: str, rules: TargetRules) -> list[EvaluationUser]:
    """Read the users with a target in the split and without a history before it, all of them or those of `data.withheld_users`."""
    return list(_find(dataset, split, rules, are_new=True))


def _find(dataset: Dataset, split: str, rules: TargetRules, are_new: bool = False) -> Iterator[EvaluationUser]:
    manifest = dataset.manifest
    share, seed = (manifest.data_config.get(name, 0) for name in ("withheld_users", "split_seed"))
    columns = [*_COLUMNS, *[CONTEXTS] * bool(manifest.contexts), *(PROFILE_COLUMNS if manifest.profiles else ()), *[USER_ID] * bool(share)]
    for rows in dataset.user_batches(columns):
        is_hidden = withheld_users(rows[USER_ID], share, seed) if share else np.zeros(rows.num_rows, bool)
        yield from _read_rows(rows, split, rules, is_hidden, are_new)


def _read_rows(rows: pa.Table, split: str, rules: TargetRules, is_hidden: Mask, are_new: bool) -> Iterator[EvaluationUser]:
    """Split some rows of the table into histories and targets; histories are views, so that their interactions are not copied.

    Users who are withheld from training, `is_hidden`, have no history in the test split either.
    """
    everything = Sequences.from_table(rows).cast(items=np.int64, events=np.int64)
    begins, ends = everything.scalars["num_train"], everything.scalars["num_train"] + everything.scalars["num_validation"]
    if split == "test":
        begins, ends = ends, everything.lengths
    interactions = replace(everything, scalars={})  # scalars would add an array per user
    lengths = np.where(is_hidden, 0, begins)
    histories, rest = interactions.within(0, lengths), replace(interactions.within(begins, ends), profiles=None)
    attributes, user_indices = rows["attributes"].to_pylist(), rows[USER_INDEX].to_pylist()
    for row in np.flatnonzero((rest.lengths > 0) & ((lengths == 0) | (not are_new))).tolist():
        history = histories[row : row + 1]
        counted, seen = rules.apply_new(rest[row : row + 1]) if are_new else rules.apply(history, rest[row : row + 1])
        if len(counted):
            places = rest.starts[row] + counted
            columns = {name: column[places] for name, column in rest.columns.items()}
            targets = Sequences(columns, np.zeros(1, np.int64), np.array([len(places)]))
            if CONTEXTS in columns:
                history = replace(history, scalars={ASKED: columns[CONTEXTS][:1]})
            query = int(columns["queries"][0])
            yield EvaluationUser(user_indices[row], history, targets, seen, dict(attributes[row] or []), query)


def batches(users: Sequence[EvaluationUser], size: int) -> Iterator[Sequence[EvaluationUser]]:
    """Yield the users in batches."""
    for begin in range(0, len(users), size):
        yield users[begin : begin + size]


def target_items(users: Sequence[EvaluationUser]) -> Integers:
    """Return each user's distinct targets, sorted by index and padded with 0, (users, maximum number of targets)."""
    return rectangle([np.unique(user.targets.items) for user in users])


def groups_of(users: Sequence[EvaluationUser]) -> dict[str, NDArray[np.str_]]:
    """Return, by attribute name, the value of each user, empty if a user has none."""
    names = sorted({name for user in users for name in user.attributes})
    return {name: np.array([user.attributes.get(name) or "" for user in users]) for name in names}


def rectangle(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stack rows of different lengths, padded with 0."""
    lengths = np.array([len(row) for row in rows])
    filled = np.zeros((len(rows), lengths.max()), rows[0].dtype)
    filled[np.arange(filled.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return filled
