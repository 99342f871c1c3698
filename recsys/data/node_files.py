"""Files shared by the processes of a node: a size-limited cache, and memory-mapped files that are built once under a lock."""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from recsys.errors import UserError
from recsys.store import private_folder
from recsys.store.backends import replacing

logger = logging.getLogger(__name__)


class DiskCache:
    """An LRU cache of bytes by key, in a folder of limited size; if a write fails, it logs a warning and turns itself off.

    Each process checks the folder's size after it has written a hundredth of the limit, and above 80 % of the limit frees down to
    64 %, so that up to twenty processes together stay below the limit.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = private_folder(folder)
        self._bytes_between_checks = max_bytes / 100
        self._limit = max_bytes - 20 * self._bytes_between_checks
        self._unchecked_bytes = max_bytes
        self._is_on = True

    def get(self, key: str) -> bytes | None:
        """Return the bytes stored under a key, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Store bytes under a key; entries larger than a tenth of the limit are not stored."""
        if not self._is_on or len(data) > 10 * self._bytes_between_checks:
            return
        try:
            self._make_room(len(data))
            with replacing(self._path(key)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            self._is_on = False
            logger.warning("%s: cannot write to the disk cache (%s); continuing without it; free disk space", self._folder, error.strerror)

    def drop(self, key: str) -> None:
        """Remove an entry, such as a damaged one."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _make_room(self, num_bytes: int) -> None:
        self._unchecked_bytes += num_bytes
        if self._unchecked_bytes < self._bytes_between_checks:
            return
        self._unchecked_bytes = 0
        with locked(self._folder):  # one process at a time frees space
            entries = sorted(self._entries())
            total = num_bytes + sum(size for _, size, _ in entries)
            for _, size, path in entries if total > self._limit else ():
                if total <= 0.8 * self._limit:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """Yield (time of last use, bytes, path) of each entry."""
        for folder in os.scandir(self._folder):
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime_ns, status.st_size, entry.path


KEPT_UNUSED_SECONDS = 7 * 24 * 3600
"""An entry that was not opened for this long is removed when another one is built in its parent folder."""

_STRINGS_AT_ONCE = 4096
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def shared_entry(folder: Path, build: Callable[[Path], None]) -> Iterator[Path]:
    """Yield the folder that `build` has filled, in this or another process of this node.

    The first process builds, the others wait. The build uses a temporary name, so an interrupted build is never read. Files must be opened
    inside the block; mapped files stay readable even if the entry is removed later.

    Raises:
        UserError: the disk is full.
    """
    with locked(folder):
        if not folder.is_dir():
            _build(folder, build)
        os.utime(folder)
        yield folder


@contextmanager
def locked(folder: Path, waits: bool = True) -> Iterator[None]:
    """Hold the node's lock of that name; the operating system releases it if the process dies.

    Raises:
        BlockingIOError: another process holds the lock, and `waits` is False.
    """
    private_folder(folder.parent)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield


def create_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Create an array of zeros in a file, to be filled in place.

    Disk space is allocated here, so that a full disk raises an error; later, in mapped memory, it would kill the process.
    """
    array = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def map_array(path: Path) -> Tensor:
    """Memory-map an array's file as a read-only tensor; writing to it would kill the process."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def write_table(path: Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write tables of one schema as an uncompressed Arrow file, part by part."""
    with pa.ipc.new_file(path, schema) as writer:
        for part in parts:
            writer.write_table(part)


def map_table(path: Path) -> pa.Table:
    """Memory-map an Arrow file as a table."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Strings(Sequence[str]):
    """A string column as a sequence; each string is created on access, so none is held in memory."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Strings": ...
    def __getitem__(self, index: int | slice) -> "str | Strings":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of strings has step 1, not {step}")
            return Strings(self._column.slice(start, max(0, stop - start)))
        text: str = self._column[int(index)].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            for begin in range(0, len(chunk), _STRINGS_AT_ONCE):
                yield from chunk.slice(begin, _STRINGS_AT_ONCE).to_pylist()


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Build under a temporary name, then rename it; the caller holds the entry's lock, so a leftover is from a process that died."""
    _remove_unused(folder.parent)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        build(private_folder(new))
        pa.default_memory_pool().release_unused()  # otherwise the pool keeps this memory until the process ends
        for path in filter(Path.is_file, new.rglob("*")):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(new, folder)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"run.scratch: the disk of {folder.parent} is full; free space there, or set run.scratch to a larger disk"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_unused(parent: Path) -> None:
    for folder in [path for path in parent.iterdir() if path.is_dir()]:
        with suppress(FileNotFoundError, BlockingIOError):
            if time.time() - folder.stat().st_mtime > KEPT_UNUSED_SECONDS:
                with locked(folder.with_name(folder.name.removesuffix(".new")), waits=False):
                    shutil.rmtree(folder, ignore_errors=True)
