"""Users' interactions as the rows of a dataset's users and training shards; where they come from and go to is not here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.data.preparing.sequences import Integers, cut_windows, gather_ranges
from recsys.data_config import DataConfig
from recsys.schema import TRAIN_SCHEMA, USERS_SCHEMA

COLUMNS = ("items", "events", "timestamps", "values")


@dataclass(frozen=True)
class Sequences:
    """Users one after another: user u's interactions are `[offsets[u]:offsets[u + 1]]` of each of COLUMNS, oldest first."""

    columns: Mapping[str, NDArray[Any]]
    offsets: Integers

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
                *(_lists(self.columns[name], self.offsets) for name in COLUMNS),
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
                *(_lists(self.columns[name][positions], bounds) for name in COLUMNS),
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
