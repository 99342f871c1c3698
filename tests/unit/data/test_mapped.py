"""Entries shared by the processes of a node: built once, never read half-written, removed when unused; and memory-mapped arrays."""

import errno
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.data import node_files as mapped
from recsys.data.node_files import Strings, create_array, locked, map_array, map_table, shared_entry, write_table
from recsys.errors import UserError

SPAWN = multiprocessing.get_context("spawn")


def build_slowly(folder: Path) -> None:
    array = create_array(folder / "array.npy", (1000, 3), np.float32)
    array[:500] = 1
    time.sleep(0.3)
    array[500:] = 1
    with (folder.parent / "built").open("a") as file:
        file.write(f"{os.getpid()}\n")


def open_entry(entry: Path, results: "multiprocessing.Queue[float]") -> None:
    with shared_entry(entry, build_slowly) as folder:
        results.put(float(map_array(folder / "array.npy").sum()))


def build_and_die(entry: Path) -> None:
    def build(folder: Path) -> None:
        create_array(folder / "array.npy", (1000, 3), np.float32)[:500] = 1
        os.kill(os.getpid(), signal.SIGKILL)

    with shared_entry(entry, build):
        pass


def run(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)


def test_one_of_many_processes_builds_and_all_read_the_whole(tmp_path: Path) -> None:
    results = SPAWN.Queue()
    run([SPAWN.Process(target=open_entry, args=(tmp_path / "shared" / "entry", results)) for _ in range(3)])
    assert [results.get(timeout=60) for _ in range(3)] == [3000.0] * 3
    assert len((tmp_path / "shared" / "built").read_text().split()) == 1


def test_a_killed_builder_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    entry = tmp_path / "shared" / "entry"
    run([SPAWN.Process(target=build_and_die, args=(entry,))])
    assert not entry.exists()
    assert entry.with_name("entry.new").exists()
    with shared_entry(entry, build_slowly) as folder:
        assert float(map_array(folder / "array.npy").sum()) == 3000
    assert not entry.with_name("entry.new").exists()


def test_a_builder_that_fails_leaves_nothing_and_the_next_builds(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), shared_entry(tmp_path / "a" / "entry", fail):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["entry.lock"]
    with shared_entry(tmp_path / "a" / "entry", build_slowly) as folder:
        assert (folder / "array.npy").exists()


def test_a_full_disk_is_one_line_with_the_key(tmp_path: Path) -> None:
    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"run\.scratch: the disk of .* is full"), shared_entry(tmp_path / "a" / "entry", fill):
        pass


def test_an_entry_nobody_opened_for_long_is_removed_unless_it_is_locked(tmp_path: Path) -> None:
    for name in ("old", "old-in-use", "new"):
        with shared_entry(tmp_path / "a" / name, build_slowly) as folder:
            array = map_array(folder / "array.npy")
    (tmp_path / "a" / "dead.new").mkdir()
    long_ago = time.time() - mapped.KEPT_UNUSED_SECONDS - 10
    for name in ("old", "old-in-use", "dead.new"):
        os.utime(tmp_path / "a" / name, (long_ago, long_ago))
    with locked(tmp_path / "a" / "old-in-use"), shared_entry(tmp_path / "a" / "another", build_slowly):
        pass
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_dir()) == ["another", "new", "old-in-use"]
    assert float(array.sum()) == 3000


def test_opening_an_entry_keeps_it(tmp_path: Path) -> None:
    with shared_entry(tmp_path / "a" / "entry", build_slowly):
        pass
    os.utime(tmp_path / "a" / "entry", (0, 0))
    with shared_entry(tmp_path / "a" / "entry", build_slowly):
        pass
    with shared_entry(tmp_path / "a" / "another", build_slowly):
        pass
    assert (tmp_path / "a" / "entry").is_dir()


@pytest.mark.parametrize("shape", [(5, 3), (5, 0), (5,)])
def test_a_mapped_array_is_what_was_written_and_gives_no_warning(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = create_array(tmp_path / "a.npy", shape, np.int32)
    assert not array.any()
    array[...] = np.arange(array.size).reshape(shape)
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        tensor = map_array(tmp_path / "a.npy")
    torch.set_warn_always(False)
    assert not given
    assert tensor.dtype == torch.int32
    assert tensor.tolist() == array.tolist()


def test_strings_read_like_a_list_without_being_one(tmp_path: Path) -> None:
    texts = ["", "one", "zwei ü", "三", *(f"text {number}" for number in range(9000))]
    schema = pa.schema([("text", pa.string())])
    write_table(tmp_path / "s.arrow", schema, (pa.table([texts[begin : begin + 2000]], schema=schema) for begin in range(0, 9004, 2000)))
    strings = Strings(map_table(tmp_path / "s.arrow")["text"])
    assert list(strings) == texts
    assert len(strings) == len(texts)
    assert strings[3] == "三"
    assert strings[np.int64(4001)] == texts[4001]
    assert strings[-1] == texts[-1]
    assert list(strings[1999:4001]) == texts[1999:4001]
    assert list(strings[9000:]) == texts[9000:]
    assert len(strings[5:2]) == 0
    with pytest.raises(IndexError):
        strings[len(texts)]
