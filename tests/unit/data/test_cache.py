"""The disk cache: entries are read back, the limit holds for several processes, a full disk is not an error."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.data.node_files import DiskCache

LIMIT = 4 << 20

FILL = """
import sys
from pathlib import Path
from recsys.data.node_files import DiskCache
cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]))
for number in range(400):
    key = f"{sys.argv[3]}-{number}"
    cache.put(key, key.encode() * 2000)
    found = cache.get(key)
    assert found is None or found == key.encode() * 2000
"""


def used_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def test_what_was_put_is_got_back_until_it_is_dropped(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    assert cache.get("a") is None
    cache.put("a", b"one")
    cache.put("b", b"two")
    cache.put("a", b"three")
    assert (cache.get("a"), DiskCache(tmp_path, LIMIT).get("b")) == (b"three", b"two")
    cache.drop("a")
    assert cache.get("a") is None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, LIMIT)
    for number in range(30):
        cache.put(str(number), bytes(100_000))
    os.utime(cache._path("0"), ns=(2**62, 2**62))
    for number in range(30, 45):
        cache.put(str(number), bytes(100_000))
    assert cache.get("0") is not None
    assert cache.get("1") is None
    assert cache.get("44") is not None


def test_several_processes_stay_below_the_limit_and_read_no_half_entry(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FILL, str(tmp_path), str(LIMIT)]
    processes = [subprocess.Popen([*arguments, name]) for name in "abc"]
    largest = 0
    try:
        while any(process.poll() is None for process in processes):
            largest = max(largest, used_bytes(tmp_path))
    finally:
        for process in processes:
            process.kill()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert LIMIT / 4 < largest <= LIMIT


def test_a_full_disk_is_a_warning_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, LIMIT)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put("a", b"one")
    cache.put("b", b"two")
    assert cache.get("a") is None
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


def test_a_limit_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 0)
    cache.put("a", b"one")
    assert cache.get("a") is None
