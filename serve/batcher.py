"""Forms batches of requests and computes them in one thread: a batch is what arrived while the one before it was computed."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")

SMOOTHING = 0.1
"""Weight of the newest batch in the estimate of the speed."""


class OverloadedError(Exception):
    """The queue is so long that a request would wait longer than allowed; `seconds` is the estimated wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is {seconds:.2f} s long")
        self.seconds = seconds


class DeadlineError(Exception):
    """The deadline passed before the request was computed."""


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """A result, how long its request waited, and how long its batch was computed."""

    result: Result
    waited_seconds: float
    computed_seconds: float


@dataclass(eq=False)
class _Waiting(Generic[Request, Result]):
    request: Request
    cost: int
    deadline: float
    future: "asyncio.Future[Timed[Result]]"
    loop: asyncio.AbstractEventLoop
    entered: float


class Batcher(Generic[Request, Result]):
    """A queue of requests and the thread that answers them.

    `compute` gets a batch of at most `max_requests` requests whose costs sum to at most `max_cost` (a single request may cost more) and
    returns a result, or an exception, for each. Nothing waits for a batch to fill. A request is admitted if the estimated time to compute
    what is queued before it is at most `max_wait_seconds`.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Request]], Sequence[Result | Exception]],
        max_requests: int,
        max_cost: int,
        max_wait_seconds: float,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._compute, self._max_requests, self._max_cost, self._max_wait_seconds = compute, max_requests, max_cost, max_wait_seconds
        self._queue: deque[_Waiting[Request, Result]] = deque()
        self._changed = threading.Condition()
        self._queued_cost = 0
        self._is_closed = False
        self._began: float | None = None
        self._seconds_per_cost = 0.0
        self._thread = threading.Thread(target=self._run, args=(prepare,), name="batches", daemon=True)
        self._thread.start()

    async def ask(self, request: Request, cost: int, deadline: float) -> Timed[Result]:
        """Return the result of a request; `deadline` is a time of `time.monotonic`.

        Raises:
            OverloadedError: the request was not admitted.
            DeadlineError: its turn came after the deadline.
        """
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Request, Result] = _Waiting(request, cost, deadline, loop.create_future(), loop, time.monotonic())
        with self._changed:
            seconds = self._queued_cost * self._seconds_per_cost
            if self._queue and seconds > self._max_wait_seconds:
                raise OverloadedError(seconds)
            self._queue.append(waiting)
            self._queued_cost += cost
            self._changed.notify()
        return await waiting.future

    def busy_seconds(self) -> float:
        """Return for how long the batch that is computed now has been computed; 0 if there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """End the thread after the batch that it computes; requests that still wait are refused as overloaded."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self, prepare: Callable[[], None]) -> None:
        prepare()
        while batch := self._next():
            begin = self._began = time.monotonic()
            late = [waiting for waiting in batch if waiting.deadline < begin]
            batch = [waiting for waiting in batch if waiting.deadline >= begin and not waiting.future.cancelled()]
            _deliver(late, [DeadlineError()] * len(late))
            if batch:
                results = self._results(batch)
                seconds = time.monotonic() - begin
                timed = zip(batch, results, strict=True)
                _deliver(
                    batch, [found if isinstance(found, Exception) else Timed(found, begin - one.entered, seconds) for one, found in timed]
                )
                self._learn(sum(waiting.cost for waiting in batch), seconds)
            self._began = None
        _deliver(list(self._queue), [OverloadedError(0)] * len(self._queue))

    def _next(self) -> list[_Waiting[Request, Result]]:
        """Wait for requests and take a batch from the front of the queue; empty: the batcher is closed."""
        batch: list[_Waiting[Request, Result]] = []
        with self._changed:
            while not self._queue and not self._is_closed:
                self._changed.wait()
            cost = 0
            while self._queue and not self._is_closed and len(batch) < self._max_requests:
                if batch and cost + self._queue[0].cost > self._max_cost:
                    break
                batch.append(self._queue.popleft())
                cost += batch[-1].cost
            self._queued_cost -= cost
        return batch

    def _results(self, batch: Sequence[_Waiting[Request, Result]]) -> Sequence[Result | Exception]:
        try:
            return self._compute([waiting.request for waiting in batch])
        except Exception as error:
            return [error] * len(batch)

    def _learn(self, cost: int, seconds: float) -> None:
        now = seconds / max(cost, 1)
        self._seconds_per_cost = now if not self._seconds_per_cost else (1 - SMOOTHING) * self._seconds_per_cost + SMOOTHING * now


def _deliver(batch: Sequence[_Waiting[Request, Result]], results: Sequence[Timed[Result] | Exception]) -> None:
    """Hand results to the waiting coroutines, with one wake-up per event loop."""
    pairs = list(zip(batch, results, strict=True))
    for loop in {waiting.loop for waiting in batch}:
        loop.call_soon_threadsafe(_set, [pair for pair in pairs if pair[0].loop is loop])


def _set(pairs: "Sequence[tuple[_Waiting[Request, Result], Timed[Result] | Exception]]") -> None:
    for waiting, result in pairs:
        if waiting.future.done():
            continue
        if isinstance(result, Exception):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)
