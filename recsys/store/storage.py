"""The object storage adapter: local folders and S3 behind one class.

Callers name objects by full URIs: an absolute local path or `s3://bucket/key`. Writes are atomic on both, and `create` is a create-once
write. On S3 this needs a server that honours `If-None-Match: *` (AWS, MinIO, Ceph and moto do). `rclone serve s3` ignores the header:
there a second `create` is refused, but two concurrent calls may both succeed.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Self

from pyarrow import fs

from recsys.config.storage import StorageConfig
from recsys.errors import UserError
from recsys.store.backends import S3_SCHEME, LocalStore, ObjectInfo, S3Store, replacing
from recsys.store.errors import explained

Listing = list[ObjectInfo]
"""Objects sorted by URI."""

_ENDPOINT = r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?/?"
_LOCAL = LocalStore()


def join(base: str, *parts: str) -> str:
    """Append relative parts to a URI; a part may have several segments, but no segment may be empty, `.` or `..`."""
    for part in parts:
        _check_segments(part, part)
    return "/".join([base.rstrip("/"), *parts])


def fixed_part(uri: str) -> str:
    """Return the segments of a pattern before the first with `*`, `?` or `[`; the whole URI if there is none."""
    segments = uri.split("/")
    first = next((index for index, segment in enumerate(segments) if any(sign in segment for sign in "*?[")), len(segments))
    return "/".join(segments[:first]) or "/"


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private_folder(path: Path) -> Path:
    """Create a folder, with its parents, that only this user can open; raise a UserError if it belongs to another user."""
    with explained("make the private folder", str(path)):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise UserError(f"{path}: belongs to another user; give a folder that you own, such as {Path.home() / 'scratch'}")
        path.chmod(0o700)
    return path


@dataclass(frozen=True)
class Storage:
    """The root and connection settings of a store, without credentials: each process takes them from the AWS credential chain.

    Methods raise a one-line `UserError`, or a `StoreError` if a retry may succeed. Pass it to other processes by pickle: each opens its
    own connections (a pickled `S3FileSystem` would lose its retry strategy, a forked client would share its sockets).
    """

    root: str
    endpoint: str | None = None
    region: str = "us-east-1"

    def __post_init__(self) -> None:
        _split(self.root)
        if self.endpoint is not None and not re.fullmatch(_ENDPOINT, self.endpoint):
            # The part before an @ may contain a password and is not shown.
            shown = self.endpoint.rpartition("@")[2]
            raise UserError(f"storage.endpoint = '{shown}': must be http(s)://host[:port]; http://127.0.0.1:9000 would work")

    @classmethod
    def from_config(cls, config: StorageConfig) -> Self:
        """Build from the config; without an endpoint there, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is used."""
        root = config.root.rstrip("/") if config.root.startswith(S3_SCHEME) else str(Path(config.root).absolute())
        endpoint = config.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        return cls(root, endpoint, config.region)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, str | None, str]]:
        return type(self), (self.root, self.endpoint, self.region)

    @cached_property
    def _s3(self) -> S3Store:
        return S3Store(self.endpoint, self.region)

    @contextmanager
    def _reach(self, action: str, uri: str) -> Iterator[tuple[LocalStore | S3Store, str]]:
        """Yield the backend of a URI and the path in it; an error in the block says that `action` failed."""
        is_s3, path = _split(uri)
        with explained(action, uri):
            yield (self._s3 if is_s3 else _LOCAL), path

    def uri(self, *parts: str) -> str:
        """Return the URI of relative `parts` below the root."""
        return join(self.root, *parts)

    def locate(self, uri: str) -> tuple[fs.FileSystem, str]:
        """Return the pyarrow filesystem, always the same instance, and the path in it. Never call `create_dir` on S3."""
        with self._reach("look up", uri) as (store, path):
            return store.filesystem, path

    def exists(self, uri: str) -> bool:
        """Return whether there is an object at exactly this URI; folders do not count."""
        return self.stat(uri) is not None

    def read_bytes(self, uri: str) -> bytes:
        """Return the content of an object."""
        with self._reach("read", uri) as (store, path):
            return store.read(path)

    def stat(self, uri: str) -> ObjectInfo | None:
        """Return the size and ETag of the object at exactly this URI; None if there is none."""
        with self._reach("look up", uri) as (store, path):
            return store.stat(path)

    def read_range(self, uri: str, start: int, num_bytes: int, etag: str = "") -> bytes:
        """Return a part of an object; with `etag`, only if the object has this ETag.

        Raises:
            ReplacedError: the object has another ETag, or ends before the part does.
        """
        with self._reach("read", uri) as (store, path):
            return store.read_range(path, start, num_bytes, etag)

    def is_remote(self, uri: str) -> bool:
        """Return whether a URI is on S3."""
        return _split(uri)[0]

    @property
    def num_retries(self) -> int:
        """The number of repeated S3 requests for objects' content by this instance."""
        return self._s3.num_retries

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write or overwrite an object; readers see the old or the new content, never a mixture."""
        with self._reach("write", uri) as (store, path):
            store.write(path, data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write an object unless it exists; one of concurrent writers gets True. The module docstring lists servers without support."""
        with self._reach("create", uri) as (store, path):
            return store.create(path, data)

    def upload(self, path: Path, uri: str) -> None:
        """Copy a local file to `uri`, overwriting; the object becomes visible when complete."""
        with self._reach(f"upload {path} to", uri) as (store, target):
            store.upload(path, target)

    def download(self, uri: str, path: Path) -> None:
        """Copy an object to a local file, overwriting; the file appears when complete."""
        with self._reach("download", uri) as (store, source), replacing(path) as temporary:
            store.download(source, temporary)

    def list(self, uri: str) -> Listing:
        """Return all objects below a folder, at any depth, sorted by URI; empty if there are none."""
        with self._reach("list", uri) as (store, path):
            return sorted(store.scan(path))

    def expand(self, uri: str) -> Listing:
        """Return one object, all below a folder, or all that match a pattern: `*`, `?`, `[a-z]` in a segment, `**` for any folders.

        Raises:
            UserError: nothing matches.
        """
        if single := self.stat(uri):
            return [single]
        root = fixed_part(uri)
        rest = uri.removeprefix(root).strip("/")
        pattern = rest.split("/") if rest else []
        found = [entry for entry in self.list(root) if _is_match(pattern, entry.uri.removeprefix(root).strip("/").split("/"))]
        if not found:
            raise UserError(f"{uri}: no such file, and no folder with files; give an absolute path or s3://bucket/key")
        return found

    def delete(self, uri: str) -> None:
        """Delete an object if it exists."""
        with self._reach("delete", uri) as (store, path):
            store.delete(path)

    def delete_tree(self, uri: str) -> None:
        """Delete all objects below a folder, if any; the folder must be below the root."""
        if ".." in uri.split("/") or not uri.rstrip("/").startswith(self.root.rstrip("/") + "/"):
            raise UserError(f"{uri}: is not below storage.root = {self.root}; only folders below it are deleted whole")
        with self._reach("delete", uri) as (store, path):
            store.delete_tree(path)


def _split(uri: str) -> tuple[bool, str]:
    """Return whether a URI is on S3, and its path in that store's filesystem."""
    if uri.startswith(S3_SCHEME):
        path = uri.removeprefix(S3_SCHEME).removesuffix("/")
        _check_segments(path, uri)
        return True, path
    if "://" in uri or not os.path.isabs(uri):
        raise UserError(f"'{uri}': is neither an absolute path nor on S3; /data/events.parquet or s3://bucket/events.parquet would work")
    return False, uri


def _is_match(pattern: list[str], path: list[str]) -> bool:
    """Return whether a path's segments match a pattern's; everything below a match also matches."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_is_match(pattern[1:], path[start:]) for start in range(len(path)))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _is_match(pattern[1:], path[1:])


def _check_segments(path: str, shown: str) -> None:
    if any(segment in {"", ".", ".."} for segment in path.split("/")):
        raise UserError(f"'{shown}': has an empty, '.' or '..' segment; name every folder, as in folder/file")
