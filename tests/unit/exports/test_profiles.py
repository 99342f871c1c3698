"""Users in a memory-mapped file equal those of a plain dict, also with equal hashes, unusual ids and missing values."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.sequences import Sequences
from recsys.exports import profiles as module
from recsys.exports.profiles import ArrowProfiles, write_profiles
from recsys.schema import USERS_SCHEMA
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.exports import users_of


def assert_equal(found: Sequences | None, expected: Sequences) -> None:
    assert found is not None
    for name in ("items", "events", "timestamps", "values"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


@pytest.mark.parametrize("batch_rows", [1, 7, 1 << 16])
def test_every_user_is_found_with_the_own_history(tmp_path: Path, batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    dataset = make_dataset(Storage(str(tmp_path / "store")), num_users=50)
    write_profiles(dataset.read_users(), tmp_path / "users.arrow")
    expected = users_of(dataset)
    for profiles in (ArrowProfiles.open(tmp_path / "users.arrow"), ArrowProfiles.of_users(dataset.read_users())):
        assert len(profiles) == 50
        assert {user_id for user_id, _ in profiles.items()} == expected.keys()
        for user_id, history in expected.items():
            assert_equal(profiles.find(user_id), history)
        assert profiles.find("nobody") is None
        assert profiles.find("") is None


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_users_with_equal_hashes_are_told_apart(batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(module, "_hash", len)
    rows = [
        {"user_id": name, "items": [number + 1], "events": [0], "timestamps": [5], "values": [None]}
        for number, name in enumerate(["aa", "b", "cc", "dd", "eee", "", "ff"])
    ]
    profiles = ArrowProfiles.of_users(pa.Table.from_pylist(rows, USERS_SCHEMA))
    for row in rows:
        assert_equal(profiles.find(row["user_id"]), Sequences.of(row["items"], row["events"], row["timestamps"], [np.nan]))
    assert profiles.find("gg") is None
    assert profiles.find("longer") is None


def test_no_users_are_no_error(tmp_path: Path) -> None:
    write_profiles(USERS_SCHEMA.empty_table(), tmp_path / "users.arrow")
    profiles = ArrowProfiles.open(tmp_path / "users.arrow")
    assert len(profiles) == 0
    assert profiles.find("a") is None
    assert list(profiles.items()) == []
