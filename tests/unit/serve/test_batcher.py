"""The batcher: batches form without waiting, costs bound them, and what cannot be answered in time is refused."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from serve.batcher import Batcher, DeadlineError, OverloadedError

FAR = float("inf")


class Doubling:
    """Doubles numbers, one batch at a time, when the test allows it; records the batches."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.gate.wait(10)
        return [2 * number for number in numbers]


async def started(compute: Doubling, number: int) -> None:
    """Wait until a number of batches has begun."""
    async with asyncio.timeout(10):
        while len(compute.batches) < number:
            await asyncio.sleep(0.001)


def test_a_batch_is_what_arrived_while_the_one_before_was_computed() -> None:
    compute = Doubling(is_open=False)
    batcher = Batcher(compute, max_requests=3, max_cost=100, max_wait_seconds=FAR)

    async def ask() -> list[int]:
        first = asyncio.create_task(batcher.ask(0, 1, FAR))
        await started(compute, 1)
        others = [asyncio.create_task(batcher.ask(number, 1, FAR)) for number in range(1, 6)]
        await asyncio.sleep(0)
        compute.gate.set()
        return [(await task).result for task in (first, *others)]

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10]
    assert compute.batches == [[0], [1, 2, 3], [4, 5]]
    batcher.close()


def test_a_batch_costs_at_most_the_limit_unless_one_request_does() -> None:
    compute = Doubling(is_open=False)
    batcher = Batcher(compute, max_requests=10, max_cost=5, max_wait_seconds=FAR)

    async def ask() -> None:
        tasks = [asyncio.create_task(batcher.ask(cost, cost, FAR)) for cost in (1, 2, 3, 2, 9, 1)]
        await started(compute, 1)
        compute.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert sum(map(len, compute.batches)) == 6
    assert all(sum(batch) <= 5 or len(batch) == 1 for batch in compute.batches)
    batcher.close()


def test_a_queue_that_is_too_long_refuses_at_once_and_recovers() -> None:
    def slow(numbers: Sequence[int]) -> list[int]:
        time.sleep(0.05 * len(numbers))
        return list(numbers)

    batcher = Batcher(slow, max_requests=1, max_cost=100, max_wait_seconds=0.12)

    async def ask() -> tuple[int, int, float]:
        await batcher.ask(0, 1, FAR)  # the speed is known from here on
        begin = time.monotonic()
        outcomes = await asyncio.gather(*(batcher.ask(number, 1, FAR) for number in range(20)), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
        seconds = time.monotonic() - begin
        assert all(error.seconds > 0.12 for error in refused)
        assert (await batcher.ask(7, 1, FAR)).result == 7
        return len(refused), len(outcomes) - len(refused), seconds

    refused, answered, seconds = asyncio.run(ask())
    assert answered < 8
    assert refused == 20 - answered
    assert seconds < 1
    batcher.close()


def test_a_request_that_is_late_or_gone_is_not_computed() -> None:
    compute = Doubling(is_open=False)
    batcher = Batcher(compute, max_requests=10, max_cost=100, max_wait_seconds=FAR)

    async def ask() -> None:
        first = asyncio.create_task(batcher.ask(1, 1, FAR))
        await started(compute, 1)
        late = asyncio.create_task(batcher.ask(2, 1, time.monotonic() + 0.01))
        gone = asyncio.create_task(batcher.ask(3, 1, FAR))
        last = asyncio.create_task(batcher.ask(4, 1, FAR))
        await asyncio.sleep(0.05)
        gone.cancel()
        compute.gate.set()
        assert ((await first).result, (await last).result) == (2, 8)
        assert (await last).waited_seconds > 0.04
        with pytest.raises(DeadlineError):
            await late

    asyncio.run(ask())
    assert compute.batches == [[1], [4]]
    batcher.close()


def test_an_error_reaches_the_requests_of_its_batch_only() -> None:
    def divide(numbers: Sequence[int]) -> list[float | Exception]:
        if 13 in numbers:
            raise KeyError("thirteen")
        return [ValueError("zero") if number == 0 else 1 / number for number in numbers]

    batcher: Batcher[int, float] = Batcher(divide, max_requests=1, max_cost=100, max_wait_seconds=FAR)

    async def ask() -> None:
        with pytest.raises(KeyError):
            await batcher.ask(13, 1, FAR)
        with pytest.raises(ValueError, match="zero"):
            await batcher.ask(0, 1, FAR)
        assert (await batcher.ask(2, 1, FAR)).result == 0.5

    asyncio.run(ask())
    batcher.close()


def test_it_says_for_how_long_it_has_computed() -> None:
    compute = Doubling(is_open=False)
    batcher = Batcher(compute, max_requests=1, max_cost=1, max_wait_seconds=FAR)
    assert batcher.busy_seconds() == 0

    async def ask() -> None:
        task = asyncio.create_task(batcher.ask(1, 1, FAR))
        await started(compute, 1)
        await asyncio.sleep(0.05)
        assert batcher.busy_seconds() > 0.04
        compute.gate.set()
        await task

    asyncio.run(ask())
    batcher.close()
    assert batcher.busy_seconds() == 0
