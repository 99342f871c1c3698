"""Bytes on the local disk up to a limit, shared by the processes of a node; what they mean and whether they are right, the caller knows."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recsys.storage import private_folder
from recsys.stores import replacing

logger = logging.getLogger(__name__)
_KEPT_SHARE = 0.8
_CHECKED_SHARE = 0.01


class DiskCache:
    """Least recently used entries are dropped; a full disk turns it off, with a warning.

    Each process looks at the folder's size again after it has written a hundredth of the limit, and then frees a fifth, so that
    up to twenty processes together stay below the limit.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = private_folder(folder)
        self._max_bytes = max_bytes
        self._unchecked_bytes = max_bytes
        self._is_on = max_bytes > 0

    def get(self, key: str) -> bytes | None:
        """Return what was put under a key, if it is still there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep bytes under a key; an entry that alone is too large for the limit is not kept."""
        if not self._is_on or len(data) > self._max_bytes * _CHECKED_SHARE * 10:
            return
        try:
            self._make_room(len(data))
            with replacing(self._path(key)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            self._is_on = False
            logger.warning("%s: cannot keep what is read (%s); reading goes on without it; free disk space", self._folder, error.strerror)

    def drop(self, key: str) -> None:
        """Forget an entry, such as one that turned out to be damaged."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _make_room(self, num_bytes: int) -> None:
        self._unchecked_bytes += num_bytes
        if self._unchecked_bytes < self._max_bytes * _CHECKED_SHARE:
            return
        self._unchecked_bytes = 0
        with self._alone():
            entries = sorted(self._entries())
            total = sum(size for _, size, _ in entries) + num_bytes
            if total <= self._max_bytes * (1 - 20 * _CHECKED_SHARE):
                return
            for _, size, path in entries:
                if total <= self._max_bytes * _KEPT_SHARE * (1 - 20 * _CHECKED_SHARE):
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """Give (time of last use, bytes, path) of each entry."""
        for folder in os.scandir(self._folder):
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime_ns, status.st_size, entry.path

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time free space."""
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
