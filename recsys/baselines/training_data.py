"""The data that baselines are fitted on: training interactions, user attributes, and unseen items."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from recsys.arrays import Integers, Mask
from recsys.data.items import ItemFeatures
from recsys.data.labels.exposures import read_held_out, read_trained
from recsys.data.labels.tasks import exposure_labels, task_labels
from recsys.data.manifest import USER_INDEX, Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences

HISTORY_LENGTH = 50
"""Number of items that a history has in a pair."""

MIN_USERS_OF_VALUE = 5
"""Attribute values with fewer users are dropped, since they add nothing to the user's id."""


@dataclass(frozen=True)
class TrainingData:
    """The interactions of positive kinds that a baseline may use. `validation` may only choose between epochs or settings.

    Shapes: U users, I items, A attributes.
    """

    dataset: Dataset
    catalogue: ItemFeatures
    train: Sequences  # (U,)
    validation: Sequences  # (U,)
    num_users: int
    attributes: Integers  # (U, A) each user's value, numbered from 1 over all attributes; 0: missing or rare
    num_attribute_values: int

    @classmethod
    def read(cls, dataset: Dataset, catalogue: ItemFeatures) -> "TrainingData":
        """Read all users."""
        table = dataset.read_users([USER_INDEX, *HISTORY_COLUMNS, "num_train", "num_validation", "attributes"])
        everything = Sequences.from_table(table).cast(items=np.int64, events=np.int64)
        num_train, num_validation = everything.scalars["num_train"], everything.scalars["num_validation"]
        parts = everything.within(0, num_train), everything.within(num_train, num_train + num_validation)
        is_target = dataset.manifest.target_kinds
        train, validation = (part.compact() if is_target.all() else part.where(is_target[part.events]) for part in parts)
        return cls(dataset, catalogue, train, validation, table.num_rows, *_attributes(table))

    @cached_property
    def known(self) -> tuple[Mask, Mask]:
        """Which users (U,) and which items (I + 1,) have training interactions or exposures."""
        users, items = self.train.lengths > 0, self.item_counts > 0
        for samples, owners in read_trained(self.dataset) if self.dataset.manifest.has_exposures else ():
            assert samples.exposures is not None
            users[owners[samples.exposures.lengths > 0]] = True
            items[samples.exposures.items] = True
        return users, items

    @property
    def num_items(self) -> int:
        """Number of items without padding."""
        return self.catalogue.num_items

    @cached_property
    def matrix(self) -> csr_array:
        """The training items of each user, a binary matrix (U, I + 1)."""
        shape = (self.num_users, self.num_items + 1)
        owners, items = self.train.owners, self.train.items
        matrix = csr_array((np.ones(len(items), np.float32), (owners, items)), shape=shape)
        matrix.sum_duplicates()
        matrix.data[:] = 1
        return matrix

    @cached_property
    def item_counts(self) -> Integers:
        """Training interactions of each item (I + 1,)."""
        return np.bincount(self.train.items, minlength=self.num_items + 1)


class UnseenItems:
    """Draws items that occur in training but not in a user's training interactions."""

    def __init__(self, data: TrainingData) -> None:
        self._items = torch.from_numpy(np.flatnonzero(data.item_counts))
        self._num_rows = data.num_items + 1
        self._taken = torch.from_numpy(np.unique(data.train.owners * self._num_rows + data.train.items))

    def draw(self, users: Tensor) -> Tensor:
        """Draw an unseen item for each user, uniformly; a user with nearly all items may get a seen one."""
        items = self._items[torch.randint(len(self._items), users.shape)]
        for _ in range(8):
            pairs = users * self._num_rows + items
            is_taken = self._taken[torch.searchsorted(self._taken, pairs).clamp(max=len(self._taken) - 1)] == pairs
            if not is_taken.any():
                break
            items[is_taken] = self._items[torch.randint(len(self._items), (int(is_taken.sum()),))]
        return items


def join_histories(histories: Sequence[Integers], max_history: int | None = None) -> tuple[Integers, Integers]:
    """Concatenate B histories, or the last `max_history` items of each; return the items and the offsets (B + 1,)."""
    recent = histories if max_history is None else [history[-max_history:] for history in histories]
    return np.concatenate([np.zeros(0, np.int64), *recent]), np.cumsum([0, *map(len, recent)])


def recency_weights(histories: Sequence[Integers], half_life: float) -> NDArray[np.float32]:
    """Return the weights of all histories' interactions, halved every `half_life` interactions back."""
    ages = np.concatenate([np.zeros(0), *(np.arange(len(history))[::-1] for history in histories)])
    return np.exp2(-ages / half_life).astype(np.float32)


def history_matrix(histories: Sequence[Integers], num_items: int, weights: NDArray[np.float32] | None = None) -> csr_array:
    """Return B histories as a matrix (B, I + 1) with the sum of each item's interaction weights; without `weights` each is 1."""
    items, offsets = join_histories(histories)
    values = np.ones(len(items), np.float32) if weights is None else weights
    matrix = csr_array((values, items, offsets), shape=(len(histories), num_items + 1))
    matrix.sum_duplicates()
    return matrix


def known_rows(users: Integers, table: Tensor) -> Tensor:
    """Return the rows of users in a table (U + 1, ...), row 0 for users not in training."""
    return torch.from_numpy(np.where((users >= 0) & (users < len(table) - 1), users + 1, 0))


@dataclass(frozen=True)
class Pairs:
    """N pairs of a user and an item with the label of a task, and the last positive items before each pair."""

    users: Integers  # (N,)
    items: Integers  # (N,)
    labels: NDArray[np.float32]  # (N,) values are standardized
    histories: NDArray[np.int32]  # (N, HISTORY_LENGTH) the last one in the last column, 0 before the first

    @classmethod
    def join(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """Concatenate one or more parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def task_pairs(data: TrainingData, column: int, part: Literal["train", "validation"]) -> Pairs:
    """Return the pairs of a part that have a label of a task: the targets and, if the log has some, the exposures."""
    manifest, is_train = data.dataset.manifest, part == "train"
    interactions = data.train if is_train else data.validation
    labels, mask = (array[:, column] for array in task_labels(manifest, interactions.events, interactions.values))
    owners, places = interactions.owners, interactions.positions if is_train else data.train.lengths[interactions.owners]
    kept = np.flatnonzero(mask > 0)
    recent = _last_items(data.train, owners[kept], places[kept])
    found = [Pairs(owners[kept], interactions.items[kept], labels[kept], recent)]
    if manifest.tasks[column].name in manifest.exposure_tasks:
        parts = (
            read_trained(data.dataset) if is_train else ((each.histories, each.user_indices) for each in read_held_out(data.dataset, part))
        )
        found += [_exposed(data, rows, np.asarray(users, np.int64), column) for rows, users in parts]
    return Pairs.join(found)


def _exposed(data: TrainingData, rows: Sequences, users: Integers, column: int) -> Pairs:
    """Return the exposures of some rows that have a label of a task."""
    manifest, shown = data.dataset.manifest, rows.exposures
    assert shown is not None
    labels, mask = (array[:, column] for array in exposure_labels(manifest, shown.flat("labels"), shown.flat("known")))
    is_target = manifest.target_kinds[rows.events]
    before = np.concatenate([[0], np.cumsum(is_target)])  # positive interactions before each one, over all rows
    begins, owners = rows.offsets[:-1], shown.owners
    places = before[begins[owners] + shown.flat("places")] - before[begins[owners]]
    kept = np.flatnonzero(mask > 0)
    recent = _last_items(rows.where(is_target), owners[kept], places[kept])
    return Pairs(users[owners[kept]], shown.items[kept].astype(np.int64), labels[kept], recent)


def _last_items(rows: Sequences, owners: Integers, places: Integers) -> NDArray[np.int32]:
    back = places[:, None] - np.arange(HISTORY_LENGTH, 0, -1)
    items = np.append(rows.items, 0)
    found = items[np.minimum(rows.offsets[owners][:, None] + np.maximum(back, 0), len(items) - 1)]
    return np.where(back >= 0, found, 0).astype(np.int32)


def _attributes(table: pa.Table) -> tuple[Integers, int]:
    """Number the (attribute, value) pairs that are not rare; return each user's numbers (U, A), and the number of pairs."""
    rows = [pairs or [] for pairs in table["attributes"].to_pylist()]
    counts = Counter(pair for pairs in rows for pair in pairs)
    common = sorted(pair for pair, count in counts.items() if count >= MIN_USERS_OF_VALUE and pair[1])
    numbers = {pair: number for number, pair in enumerate(common, start=1)}
    columns = {name: column for column, name in enumerate(sorted({name for name, _ in common}))}
    attributes = np.zeros((table.num_rows, len(columns)), np.int64)
    for row, pairs in enumerate(rows):
        for pair in pairs:
            if pair in numbers:
                attributes[row, columns[pair[0]]] = numbers[pair]
    return attributes, len(common)
