"""Users' interactions as rows of the users and training shards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Integers
from recsys.config.data import DataConfig
from recsys.ingest.write.sequences import cut_windows, gather_ranges
from recsys.ingest.write.splits import TRAINING, VALIDATION, WITHHELD
from recsys.schema import SEQUENCE_COLUMNS, TRAIN_SCHEMA, USERS_SCHEMA


@dataclass(frozen=True)
class Sequences:
    """Users one after another: user u's interactions are `[offsets[u]:offsets[u + 1]]` of each of SEQUENCE_COLUMNS, oldest first."""

    columns: Mapping[str, NDArray[Any]]
    offsets: Integers

    @property
    def owners(self) -> Integers:
        """The position of each interaction's user."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def by_part(self, parts: Integers) -> tuple["Sequences", Integers, Integers]:
        """Put each user's training interactions first, then validation, then test, each in the order that they have.

        What is withheld is left out. Also returns how many of each user's are for training and for validation.
        """
        num_users = len(self.offsets) - 1
        cells = self.owners * (WITHHELD + 1) + parts
        counts = np.bincount(cells, minlength=num_users * (WITHHELD + 1)).reshape(num_users, WITHHELD + 1)
        order = np.argsort(cells, kind="stable")
        order = order[parts[order] != WITHHELD]
        offsets = np.concatenate([[0], np.cumsum(counts[:, :WITHHELD].sum(axis=1))]).astype(np.int64)
        columns = {name: column[order] for name, column in self.columns.items()}
        return Sequences(columns, offsets), counts[:, TRAINING], counts[:, VALIDATION]

    def users_table(
        self,
        user_indices: Integers,
        user_ids: pa.Array | pa.ChunkedArray,
        num_train: Integers,
        num_validation: Integers,
        attributes: pa.Array | pa.ChunkedArray,
    ) -> pa.Table:
        """Lay out one row per user (USERS_SCHEMA)."""
        return pa.table(
            [
                pa.array(user_indices, pa.int64()),
                user_ids,
                *(_lists(self.columns[name], self.offsets) for name in SEQUENCE_COLUMNS),
                pa.array(num_train, pa.int32()),
                pa.array(num_validation, pa.int32()),
                attributes,
            ],
            schema=USERS_SCHEMA,
        )

    def train_table(self, user_indices: Integers, first_targets: Integers, num_train: Integers, data: DataConfig) -> pa.Table:
        """Cut each user's training part into samples (TRAIN_SCHEMA) whose targets begin at the user's `first_targets`."""
        stride = data.window_stride or data.max_history
        windows = [
            (user, window)
            for user, (first, length) in enumerate(zip(first_targets.tolist(), num_train.tolist(), strict=True))
            for window in cut_windows(length, data.max_history, stride, first)
        ]
        owners = np.array([user for user, _ in windows], np.int64)
        starts = np.array([window.start for _, window in windows], np.int64) + self.offsets[owners]
        stops = np.array([window.stop for _, window in windows], np.int64) + self.offsets[owners]
        positions, bounds = gather_ranges(starts, stops)
        return pa.table(
            [
                pa.array(user_indices[owners], pa.int64()),
                *(_lists(self.columns[name][positions], bounds) for name in SEQUENCE_COLUMNS),
                pa.array([window.first_target for _, window in windows], pa.int32()),
            ],
            schema=TRAIN_SCHEMA,
        )

    def within(self, name: str, starts: Integers, stops: Integers) -> NDArray[Any]:
        """Gather one column over the positions from `starts` up to `stops` of each user."""
        positions, _ = gather_ranges(self.offsets[:-1] + starts, self.offsets[:-1] + np.maximum(starts, stops))
        return self.columns[name][positions]


def _lists(values: NDArray[Any], offsets: Integers) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
