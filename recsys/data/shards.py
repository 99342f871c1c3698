"""Row groups of the training shards: fetched by byte range, verified, cached, and prefetched in the plan's order within a byte limit."""

import heapq
import io
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.arrays import Integers
from recsys.data.manifest import Dataset, Shard
from recsys.data.node_files import DiskCache
from recsys.data.plan import EpochPlan, Window
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.store import ReplacedError, sha256_of

logger = logging.getLogger(__name__)
_DECODE_ATTEMPTS = 3


class RowGroupSource:
    """Random access to the training rows by row group, numbered over all shards in the manifest's order. Thread-safe.

    Only the requested columns are fetched. Each read compares the shard's ETag with the manifest; if it differs (a copied dataset), the
    whole shard is hashed once. Remote and cached data is verified by the checksums of Parquet pages.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str], cache: DiskCache | None = None) -> None:
        files = [(_ShardFile(dataset, shard, columns, cache), shard) for shard in dataset.manifest.train_shards]
        self._groups = [(file, group) for file, shard in files for group in range(len(shard.row_groups))]

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, group: int) -> pa.Table:
        """Read one row group.

        Raises:
            UserError: the shard is missing, replaced or damaged; the message names it.
        """
        file, number = self._groups[group]
        return file.read(number)


class _ShardFile:
    """One shard; its footer is read on first use."""

    def __init__(self, dataset: Dataset, shard: Shard, columns: Sequence[str], cache: DiskCache | None) -> None:
        self._storage = dataset.storage
        self._uri = dataset.address(shard)
        self._is_remote = dataset.storage.is_remote(self._uri)
        self._shard = shard
        self._columns = list(columns)
        self._cache = cache
        self._etag = shard.etag
        self._opening = threading.Lock()
        self._footer: pq.FileMetaData | None = None

    def read(self, group: int) -> pa.Table:
        for attempt in range(1, _DECODE_ATTEMPTS + 1):
            try:
                return self._read_remote(group) if self._is_remote else self._read_local(group)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                if attempt == _DECODE_ATTEMPTS:
                    raise UserError(f"{self._uri}: row group {group} cannot be decoded ({reason}); prepare the dataset again") from error
                logger.warning("%s: row group %d is damaged (%s); reading it again", self._uri, group, reason)
        raise AssertionError("unreachable")

    def _read_local(self, group: int) -> pa.Table:
        """Read from a local file, opened for each read: there may be more shards than a process may open files."""
        footer, (_, path) = self._open(), self._storage.locate(self._uri)
        for _ in range(2):
            before = self._storage.stat(self._uri)
            if before is not None and before.etag != self._etag:
                self._verify()
                self._etag = before.etag
            rows = pq.ParquetFile(path, metadata=footer, pre_buffer=False).read_row_group(group, columns=self._columns, use_threads=False)
            if self._storage.stat(self._uri) == before:
                return rows
        raise self._replaced("it changes while it is read")

    def _read_remote(self, group: int) -> pa.Table:
        source = _RangeFile(self._shard.num_bytes, self._fetch)
        try:  # pre_buffer fetches neighboring columns as one range
            file = pq.ParquetFile(source, metadata=self._open(), pre_buffer=True, page_checksum_verification=True)
            return file.read_row_group(group, columns=self._columns, use_threads=False)
        except (pa.ArrowException, OSError):
            if self._cache:
                for start, stop in source.fetched:
                    self._cache.drop(self._key(start, stop))
            raise

    def _open(self) -> pq.FileMetaData:
        with self._opening:
            if self._footer is None:  # bypasses the cache, since a footer has no checksum
                footer = pq.read_metadata(_RangeFile(self._shard.num_bytes, self._fetch_from_store))
                if tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups)) != self._shard.row_groups:
                    raise self._replaced("its row groups differ from the manifest's")
                self._footer = footer
            return self._footer

    def _fetch(self, start: int, stop: int) -> bytes:
        key = self._key(start, stop)
        found = self._cache.get(key) if self._cache else None
        if found is None:
            found = self._fetch_from_store(start, stop)
            if self._cache:
                self._cache.put(key, found)
        return found

    def _fetch_from_store(self, start: int, stop: int) -> bytes:
        for _ in range(2):
            try:
                if self._etag:
                    return self._storage.read_range(self._uri, start, stop - start, self._etag)
                stored = self._storage.stat(self._uri)
                found = stored.etag if stored else None
            except ReplacedError as error:
                found = error.etag
            if found is None:
                raise self._replaced("it is missing or truncated, or its ETag keeps changing")
            self._verify()
            self._etag = found
        raise self._replaced("it changes while it is read")

    def _verify(self) -> None:
        """Compare the shard's hash with the manifest: a copied shard has another ETag and the same content."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "shard.parquet"
            self._storage.download(self._uri, path)
            if sha256_of(path) != self._shard.sha256:
                raise self._replaced("its hash differs from the manifest's")

    def _replaced(self, reason: str) -> UserError:
        return UserError(
            f"{self._uri}: was replaced since the dataset was made ({reason}); prepare the dataset again, or restore the shard"
        )

    def _key(self, start: int, stop: int) -> str:
        return f"{self._shard.sha256}-{start}-{stop}"


class _RangeFile(io.RawIOBase):
    """A file that fetches each read as one byte range; `fetched` lists the (start, stop) of each."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._place = size, fetch, 0
        self.fetched: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        start, stop = self._place, self._size if size < 0 else min(self._place + size, self._size)
        if stop <= start:
            return b""
        self.fetched.append((start, stop))
        self._place = stop
        return self._fetch(start, stop)


_FIRST_BYTES_PER_SAMPLE = 1024.0


class WindowLoader:
    """Loads one rank's windows of one epoch, in the order in which its steps need them. Not thread-safe.

    `numbers` are the rank's first samples (see `EpochPlan.numbers`), at least one of each stream that it reads. At most about
    `prefetch_bytes` of windows are loaded ahead of those that a step already needs.
    """

    def __init__(self, plan: EpochPlan, source: RowGroupSource, numbers: Integers, prefetch_bytes: int, num_threads: int) -> None:
        self._plan = plan
        self._source = source
        self._cut_groups: dict[int, Future[pa.Table]] = {}
        self._lock = threading.Lock()
        self._prefetch_bytes = prefetch_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
        self._next = self._in_order_of_need(numbers)
        self._ahead: deque[tuple[Window, Future[Sequences]]] = deque()
        self._loaded: defaultdict[int, deque[tuple[Window, Sequences]]] = defaultdict(deque)
        self._bytes_per_sample = _FIRST_BYTES_PER_SAMPLE

    def take(self, stream: int, start: int, stop: int) -> Iterator[Sequences]:
        """Yield the rows at places `start` to `stop` of a stream; places must not decrease from call to call."""
        mine = self._loaded[stream]
        while mine and mine[0][0].end <= start:
            mine.popleft()
        while not mine or mine[-1][0].end < stop:
            self._submit_ahead()
            window, loading = self._ahead.popleft()
            rows = loading.result()
            self._bytes_per_sample = sum(column.nbytes for column in rows.columns.values()) / max(1, len(rows))
            self._loaded[window.stream].append((window, rows))
        for window, rows in mine:
            if window.begin < stop and window.end > start:
                yield rows[max(start - window.begin, 0) : stop - window.begin]

    def close(self) -> None:
        """Shut down the threads without waiting for pending loads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit_ahead(self) -> None:
        """Start loading windows up to the limit, at least one."""
        while not self._ahead or sum(window.num_samples for window, _ in self._ahead) * self._bytes_per_sample < self._prefetch_bytes:
            window = next(self._next, None)
            if window is None:
                return
            self._ahead.append((window, self._threads.submit(self._load, window)))

    def _load(self, window: Window) -> Sequences:
        table = pa.concat_tables([self._read(*span) for span in window.spans])
        rows = Sequences.from_table(table, sample_id=self._plan.line_ids(window))
        return rows[self._plan.shuffle(window)].compact() if self._plan.window else rows

    def _read(self, group: int, start: int, stop: int) -> pa.Table:
        """Read rows of one row group; a row group that is cut between streams is decoded once for all, unless too many are in use."""
        if stop - start == self._plan.row_groups[group]:
            return self._source.read(group)
        fresh: Future[pa.Table] = Future()
        with self._lock:
            reading = self._cut_groups.setdefault(group, fresh)
            if len(self._cut_groups) > 2 * self._plan.num_streams:
                del self._cut_groups[next(iter(self._cut_groups))]
        if reading is fresh:
            try:
                fresh.set_result(self._source.read(group))
            except BaseException as error:
                fresh.set_exception(error)
        return reading.result().slice(start, stop - start)

    def _in_order_of_need(self, numbers: Integers) -> Iterator[Window]:
        """Yield the windows from each stream's first place on, ordered by the sample that needs them first."""
        streams = self._plan.num_streams
        first_places = {number % streams: number // streams for number in reversed(numbers.tolist())}
        waiting = (self._plan.windows(stream)[self._plan.window_at(stream, place) :] for stream, place in first_places.items())
        return heapq.merge(*waiting, key=lambda window: window.begin * streams + window.stream)
