"""The users of an evaluation, which are those with a target in the split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Integers
from recsys.data.manifest import USER_INDEX, Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.errors import UserError

READ_ROWS = 4096
_COLUMNS = [USER_INDEX, *HISTORY_COLUMNS, "queries", "num_train", "num_validation", "attributes"]


@dataclass(frozen=True)
class EvaluationUser:
    """One user's history before the split, and the targets in the split that are not in the history.

    `query` is the index of the query typed before the first target, 0 for none.
    """

    user_index: int
    history: Sequences
    targets: Sequences
    attributes: dict[str, str]
    query: int


def read_evaluation_users(dataset: Dataset, split: str) -> list[EvaluationUser]:
    """Read the users with a target in the split; targets that the user has seen before do not count.

    Raises:
        UserError: there is no such user.
    """
    return list(find_users(dataset, split))


def find_users(dataset: Dataset, split: str) -> Iterator[EvaluationUser]:
    """Read the users like `read_evaluation_users`, shard by shard; the first is found at once.

    Raises:
        UserError: there is no such user.
    """
    manifest = dataset.manifest
    by_shard = manifest.version == 1  # a later version may replace users of an earlier shard
    tables = (dataset.read_shard(shard, _COLUMNS) for shard in manifest.users_shards) if by_shard else (dataset.read_users(_COLUMNS),)
    users = (user for table in tables for rows in table.to_batches(READ_ROWS) for user in _read_rows(rows, split))
    first = next(users, None)
    if first is None:
        raise UserError(
            f"{dataset.uri}: no user has a {split} target that they have not seen before; with data.split = leave_one_out users need "
            "3 interactions, with 'time' some after data.validation_from and data.test_from"
        )
    return chain([first], users)


def _read_rows(rows: pa.RecordBatch, split: str) -> Iterator[EvaluationUser]:
    """Split some rows of the table into histories and targets; histories are views, so that their interactions are not copied."""
    everything = Sequences.from_table(pa.Table.from_batches([rows])).cast(items=np.int64, events=np.int64)
    begins, ends = everything.scalars["num_train"], everything.scalars["num_train"] + everything.scalars["num_validation"]
    if split == "test":
        begins, ends = ends, everything.lengths
    interactions = replace(everything, scalars={})  # scalars would add an array per user
    histories, rest = interactions.within(0, begins), interactions.within(begins, ends)
    attributes, user_indices = rows["attributes"].to_pylist(), rows[USER_INDEX].to_pylist()
    for row, (seen, items) in enumerate(zip(histories.split("items"), rest.split("items"), strict=True)):
        is_new = ~np.isin(items, seen)
        if len(seen) and is_new.any():
            places = rest.starts[row] + np.flatnonzero(is_new)
            columns = {name: column[places] for name, column in rest.columns.items()}
            targets = Sequences(columns, np.zeros(1, np.int64), np.array([len(places)]))
            query = int(columns["queries"][0])
            yield EvaluationUser(user_indices[row], histories[row : row + 1], targets, dict(attributes[row] or []), query)


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
