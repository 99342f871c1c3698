"""Loads the plan's shuffle windows ahead of their use, on threads and within a limit of bytes; where they come from is `shards.py`."""

import heapq
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from recsys.data.plan import EpochPlan, Indices, Window
from recsys.data.rows import Rows
from recsys.data.shards import RowGroupSource

_FIRST_BYTES_PER_SAMPLE = 1024.0


class CutRowGroups:
    """The row groups that the cuts between streams divide: each is decoded once for all its streams, if not too many are in use."""

    def __init__(self, source: RowGroupSource, plan: EpochPlan) -> None:
        self._source = source
        self._sizes = plan.row_groups
        self._tables: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._capacity = 2 * plan.num_streams
        self._lock = threading.Lock()

    def read(self, group: int, start: int, stop: int) -> pa.Table:
        """Read rows of one row group."""
        if stop - start == self._sizes[group]:
            return self._source.read(group)
        with self._lock:
            reading = self._tables.get(group)
            is_first = reading is None
            if reading is None:
                reading = self._tables[group] = Future()
                if len(self._tables) > self._capacity:
                    self._tables.popitem(last=False)
        if is_first:
            try:
                reading.set_result(self._source.read(group))
            except BaseException as error:
                reading.set_exception(error)
        return reading.result().slice(start, stop - start)


class WindowLoader:
    """One rank's windows of one epoch, in the order in which its steps need them; one thread may ask at a time.

    `numbers` are the rank's first samples (see `EpochPlan.numbers`), enough of them to touch every stream that it reads. At most
    `prefetch_bytes` of windows are loaded, or being loaded, beyond those that a step already needs.
    """

    def __init__(self, plan: EpochPlan, source: RowGroupSource, numbers: Indices, prefetch_bytes: int, num_threads: int) -> None:
        self._plan = plan
        self._groups = CutRowGroups(source, plan)
        self._prefetch_bytes = prefetch_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
        self._next = self._in_order_of_need(numbers)
        self._ahead: deque[tuple[Window, Future[Rows]]] = deque()
        self._loaded: defaultdict[int, deque[tuple[Window, Rows]]] = defaultdict(deque)
        self._bytes_per_sample = _FIRST_BYTES_PER_SAMPLE

    def take(self, stream: int, start: int, stop: int) -> Iterator[Rows]:
        """Give the rows at places `start` to `stop` of a stream; places may only grow from call to call."""
        self._load_until(stream, start, stop)
        for window, rows in self._loaded[stream]:
            if window.begin < stop and window.end > start:
                yield rows.slice(max(start - window.begin, 0), stop - window.begin)

    def close(self) -> None:
        """Let the threads end; what is being loaded is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load_until(self, stream: int, start: int, stop: int) -> None:
        """Wait until a stream is there up to a place, and drop its windows that are passed."""
        mine = self._loaded[stream]
        while mine and mine[0][0].end <= start:
            mine.popleft()
        while not mine or mine[-1][0].end < stop:
            self._submit_ahead()
            window, loading = self._ahead.popleft()
            rows = loading.result()
            self._bytes_per_sample = rows.num_bytes / max(1, len(rows))
            self._loaded[window.stream].append((window, rows))

    def _submit_ahead(self) -> None:
        """Start loading until the limit, one window at least."""
        while not self._ahead or self._bytes_ahead() < self._prefetch_bytes:
            window = next(self._next, None)
            if window is None:
                return
            self._ahead.append((window, self._threads.submit(self._load, window)))

    def _bytes_ahead(self) -> float:
        return sum(window.num_samples for window, _ in self._ahead) * self._bytes_per_sample

    def _load(self, window: Window) -> Rows:
        spans = zip(window.groups, window.starts, window.stops, strict=True)
        table = pa.concat_tables([self._groups.read(*span) for span in spans])
        rows = Rows.from_table(table, self._plan.line_ids(window))
        return rows.take(self._plan.shuffle(window)).compact() if self._plan.window else rows

    def _in_order_of_need(self, numbers: Indices) -> Iterator[Window]:
        """Give the windows from the first place of each stream on, by the number of the sample that needs them first."""
        streams = self._plan.num_streams
        first_places = {number % streams: number // streams for number in reversed(numbers.tolist())}
        waiting = (self._plan.windows(stream)[self._plan.window_at(stream, place) :] for stream, place in first_places.items())
        return heapq.merge(*waiting, key=lambda window: window.begin * streams + window.stream)
