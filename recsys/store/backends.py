"""The backends of `recsys.store.storage`: local folders and S3."""

import os
import random
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, HTTPClientError, IncompleteReadError
from pyarrow import fs
from s3transfer.exceptions import S3DownloadFailedError

from recsys.errors import UserError
from recsys.store.errors import is_temporary, status_of

S3_SCHEME = "s3://"
TEMP_PREFIX = ".partial-"
"""Prefix of temporary local files, which a killed writer may leave behind; `scan` skips them."""

MAX_ATTEMPTS = 10
"""Attempts per request, with jittered backoff: at most about a minute of 503s."""

LONGEST_PAUSE_SECONDS = 10.0
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 10


@dataclass(frozen=True, order=True)
class ObjectInfo:
    """A stored object; `etag` changes whenever the content does and is comparable only within one store."""

    uri: str
    num_bytes: int
    etag: str


class ReplacedError(Exception):
    """An object is not the expected one; `etag` is the ETag of the current object, None if unknown."""

    def __init__(self, etag: str | None) -> None:
        super().__init__(f"is another object (ETag {etag or 'changing'})")
        self.etag = etag


class LocalStore:
    """Local folders. Writes are atomic: to a temporary name, which is then renamed or linked."""

    filesystem = fs.LocalFileSystem()

    def stat(self, path: str) -> ObjectInfo | None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(status.st_mode) else ObjectInfo(path, status.st_size, _local_etag(status))

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def read_range(self, path: str, start: int, num_bytes: int, etag: str) -> bytes:
        with open(path, "rb", buffering=0) as file:
            found = _local_etag(os.fstat(file.fileno()))
            data = os.pread(file.fileno(), num_bytes, start)
        if etag not in ("", found) or len(data) != num_bytes:
            raise ReplacedError(found)
        return data

    def write(self, path: str, data: bytes) -> None:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data)

    def create(self, path: str, data: bytes) -> bool:
        with _temporary(Path(path)) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def upload(self, source: Path, path: str) -> None:
        with replacing(Path(path)) as temporary:
            shutil.copyfile(source, temporary)

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(path, target)

    def scan(self, path: str) -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(path, onerror=_raise_unless_missing):
            for name in names:
                found = None if name.startswith(TEMP_PREFIX) else self.stat(os.path.join(folder, name))
                if found is not None:
                    yield found

    def delete(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def delete_tree(self, path: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


class S3Store:
    """S3 through boto3, and through pyarrow for tables; both are configured from the same fields."""

    def __init__(self, endpoint: str | None, region: str) -> None:
        self._endpoint = endpoint
        self._region = region
        self._known_buckets: set[str] = set()
        self._counting = threading.Lock()
        self.num_retries = 0

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        address = urlsplit(self._endpoint) if self._endpoint else None
        return fs.S3FileSystem(
            region=self._region,
            scheme=address.scheme if address else "https",
            endpoint_override=address.netloc if address else None,
            allow_bucket_creation=False,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            request_timeout=READ_TIMEOUT_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        )

    @cached_property
    def _client(self) -> Any:
        return self._make_client(MAX_ATTEMPTS)

    @cached_property
    def _reading_client(self) -> Any:
        return self._make_client(1)

    def _make_client(self, max_attempts: int) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=READ_TIMEOUT_SECONDS,
            max_pool_connections=32,
            # Servers other than AWS often do not support streamed checksums; TLS or the signed hash protects the transfer.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # pyarrow does not read these variables, and both must use the same server.
            ignore_configured_endpoint_urls=True,
            s3={"addressing_style": "path" if self._endpoint else "auto"},
        )
        return boto3.Session().client("s3", endpoint_url=self._endpoint, region_name=self._region, config=config)

    def _head(self, bucket: str, key: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if status_of(error) != 404:
                raise
            # A HEAD response does not say what is missing; a wrong bucket must not look like a missing object.
            if bucket not in self._known_buckets:
                self._client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
                self._known_buckets.add(bucket)
            return None
        return head

    def stat(self, path: str) -> ObjectInfo | None:
        bucket, _, key = path.partition("/")
        head = self._head(bucket, key) if key else None
        return None if head is None else ObjectInfo(S3_SCHEME + path, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, path: str) -> bytes:
        return self._get(path, "", {})

    def read_range(self, path: str, start: int, num_bytes: int, etag: str) -> bytes:
        data = self._get(path, etag, {"Range": f"bytes={start}-{start + num_bytes - 1}"})
        if len(data) != num_bytes:
            raise ReplacedError(None)
        return data

    def _get(self, path: str, etag: str, request: dict[str, str]) -> bytes:
        """Get an object or a part of it; retry with random backoff after a temporary error, an interrupted body or another ETag.

        The ETag is compared here, because not every server honours `If-Match`.
        """
        bucket, key = _split_key(path)
        others: set[str] = set()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                answer = self._reading_client.get_object(Bucket=bucket, Key=key, **request)
                data, found = bytes(answer["Body"].read()), answer.get("ETag", "").strip('"')
                if etag in ("", found):
                    return data
                others.add(found)
            except (ClientError, BotoCoreError) as error:
                if status_of(error) == 416:  # the object ends before the range begins
                    raise ReplacedError(None) from error
                may_help = is_temporary(error) or isinstance(error, HTTPClientError | IncompleteReadError | EndpointConnectionError)
                if attempt == MAX_ATTEMPTS or not may_help:
                    raise
            with self._counting:
                self.num_retries += 1
            time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.05 * 2**attempt)))
        raise ReplacedError(others.pop() if len(others) == 1 else None)

    def write(self, path: str, data: bytes) -> None:
        _repeat_if_damaged(lambda: self._client.upload_fileobj(BytesIO(data), *_split_key(path)))

    def create(self, path: str, data: bytes) -> bool:
        bucket, key = _split_key(path)
        writer = uuid.uuid4().hex
        for attempt in range(MAX_ATTEMPTS):
            head = self._head(bucket, key)  # the only protection if the server ignores If-None-Match
            if head is not None:
                # If the response to a put was lost, boto3 repeats it and the repeat is refused: the object is still ours.
                return bool(head["Metadata"].get("writer") == writer)
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
                return True
            except ClientError as error:
                if status_of(error) not in {409, 412}:
                    raise
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise UserError(f"{S3_SCHEME}{path}: was refused {MAX_ATTEMPTS} times because of another, missing object; start again later")

    def upload(self, source: Path, path: str) -> None:
        def send() -> None:
            with source.open("rb") as file:
                self._client.upload_fileobj(file, *_split_key(path))

        _repeat_if_damaged(send)

    def download(self, path: str, target: Path) -> None:
        def fetch() -> None:
            before = self.stat(path)
            replaced = ClientError({"Error": {"Code": "PreconditionFailed", "Message": "replaced while it was read"}}, "GetObject")
            with target.open("wb") as file:
                try:
                    self._client.download_fileobj(*_split_key(path), file)
                except S3DownloadFailedError as error:  # a part had another ETag than the first
                    raise replaced from error
            # After an interrupted body boto3 overwrites the file: if the object was replaced meanwhile, an old tail may remain.
            if before is not None and target.stat().st_size != before.num_bytes:
                raise replaced

        _repeat_if_damaged(fetch)

    def _pages(self, path: str) -> Iterator[list[dict[str, Any]]]:
        """Yield all keys below a folder, including directory markers, in pages of at most 1000."""
        bucket, _, key = path.partition("/")
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            yield page.get("Contents", [])

    def scan(self, path: str) -> Iterator[ObjectInfo]:
        bucket = path.partition("/")[0]
        for entry in chain.from_iterable(self._pages(path)):
            if not entry["Key"].endswith("/"):
                yield ObjectInfo(f"{S3_SCHEME}{bucket}/{entry['Key']}", entry["Size"], entry["ETag"].strip('"'))

    def delete(self, path: str) -> None:
        bucket, key = _split_key(path)
        self._client.delete_object(Bucket=bucket, Key=key)

    def delete_tree(self, path: str) -> None:
        for page in filter(None, list(self._pages(path))):
            keys = [{"Key": entry["Key"]} for entry in page]
            answer = self._client.delete_objects(Bucket=path.partition("/")[0], Delete={"Objects": keys, "Quiet": True})
            if answer.get("Errors"):
                raise ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")


def _split_key(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    if not key:
        raise UserError(f"{S3_SCHEME}{path}: is a bucket, not an object; s3://{path}/key would work")
    return bucket, key


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` and delete it on exit; create parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; if the block succeeds, the file atomically replaces `path`."""
    with _temporary(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Sync a file to disk, so that a power failure does not leave an empty file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _repeat_if_damaged(transfer: Callable[[], object]) -> object:
    """Run a transfer; repeat it from the start if it was damaged in transit or its object was replaced.

    A server returns NoSuchUpload if it already completed the upload, but its response was lost and the request repeated.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return transfer()
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"InvalidPart", "NoSuchUpload", "PreconditionFailed", "BadDigest"}:
                raise
    return transfer()
