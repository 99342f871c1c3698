"""Users' histories and profiles by user id: the `ProfileStore` protocol, and a memory-mapped Arrow file that implements it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.schema import PROFILE_COLUMNS, USER_ID

HASH = "user_hash"
BATCH_ROWS = 1 << 16
STORED = (USER_ID, *HISTORY_COLUMNS, *PROFILE_COLUMNS)
"""The columns of users that are stored; those of profiles only in datasets that have profiles."""


class ProfileStore(Protocol):
    """Finds the histories of users."""

    def find(self, user_id: str) -> Sequences | None:
        """Return a user's history with the profile, if the dataset has profiles; None for an unknown user."""


class ArrowProfiles:
    """The users of an export, sorted by a hash of their ids. A look-up is a binary search; only the history found is copied."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = [_Columns(batch) for batch in batches if batch.num_rows]
        self._first_hashes = np.array([columns.hashes[0] for columns in self._batches], np.int64)

    @classmethod
    def of_users(cls, users: pa.Table) -> "ArrowProfiles":
        """Build from a table of users (`user_id` and the sequences of USERS_SCHEMA) in memory."""
        return cls(_sorted(users).to_batches(BATCH_ROWS))

    @classmethod
    def open(cls, path: Path) -> "ArrowProfiles":
        """Memory-map a file written by `write_profiles`; its pages are loaded on demand and shared by the processes of a node."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([reader.get_batch(number) for number in range(reader.num_record_batches)])

    def __len__(self) -> int:
        return sum(len(columns.hashes) for columns in self._batches)

    def find(self, user_id: str) -> Sequences | None:
        """Return a user's history; None for an unknown user."""
        user_hash = _hash(user_id)
        number = int(np.searchsorted(self._first_hashes, user_hash, side="right")) - 1
        while number >= 0:  # ids with equal hashes may span two batches
            columns = self._batches[number]
            begin, end = (int(np.searchsorted(columns.hashes, user_hash, side)) for side in ("left", "right"))
            for row in range(begin, end):
                if columns.user_ids[row].as_py() == user_id:
                    return columns.history(row)
            number = number - 1 if columns.hashes[0] == user_hash else -1
        return None

    def items(self) -> Iterator[tuple[str, Sequences]]:
        """Yield all users with their histories, in the order of the file."""
        for columns in self._batches:
            for row, user_id in enumerate(columns.user_ids.to_pylist()):
                yield user_id, columns.history(row)


class _Columns:
    """Views of a batch's columns."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.user_ids = batch.column(USER_ID)
        self.hashes = batch.column(HASH).to_numpy()
        self._offsets = batch.column("items").offsets.to_numpy()
        items, events, timestamps, values = (batch.column(name).values for name in HISTORY_COLUMNS)
        self._items, self._events, self._timestamps = (column.to_numpy() for column in (items, events, timestamps))
        self._values = values
        has_profiles = set(PROFILE_COLUMNS).issubset(batch.schema.names)
        self._profiles = Sequences.profiles_of(pa.Table.from_batches([batch]).select(PROFILE_COLUMNS)) if has_profiles else None

    def history(self, row: int) -> Sequences:
        here = slice(self._offsets[row], self._offsets[row + 1])
        found = Sequences.of(
            self._items[here], self._events[here], self._timestamps[here], self._values[here].to_numpy(zero_copy_only=False)
        )
        return found if self._profiles is None else replace(found, profiles=self._profiles[row : row + 1])


def write_profiles(users: pa.Table, path: Path) -> None:
    """Write a table of users (`user_id` and the sequences of USERS_SCHEMA) as a file for `ArrowProfiles.open`."""
    table = _sorted(users)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, BATCH_ROWS)


def _sorted(users: pa.Table) -> pa.Table:
    hashes = np.fromiter((_hash(user_id) for user_id in users[USER_ID].to_pylist()), np.int64, users.num_rows)
    table = users.select([name for name in STORED if name in users.column_names]).append_column(HASH, pa.array(hashes))
    return table.take(pa.array(np.argsort(hashes, kind="stable"))).combine_chunks()


def _hash(user_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=8).digest(), "big", signed=True)
