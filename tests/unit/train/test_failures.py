"""Classifying failures: the cause among the errors of several ranks, whether a restart may help, and when."""

import pickle

import pytest

from recsys.errors import StoreError, UserError
from recsys.train.failures import (
    Failure,
    Kind,
    NonFiniteError,
    TrainingError,
    delay_seconds,
    describe,
    reason_to_stop,
    root_cause,
    steps_to_skip,
)


def failure(kind: Kind, step: int | None = None, message: str = "it failed", rank: int | None = None) -> Failure:
    return Failure(kind=kind, message=message, rank=rank, step=step)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("data.dataset = x: is gone"), "mistake"),
        (StoreError("cannot read s3://b/k: 503"), "store"),
        (NonFiniteError("step 3: loss retrieval is not finite"), "not_finite"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:119] data. DefaultCPUAllocator: can't allocate memory: 99 bytes"), "out_of_memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"), "collective"),
        (KeyError("items"), "exception"),
    ],
)
def test_what_an_exception_of_the_loop_is(error: Exception, kind: str) -> None:
    found = describe(error, 1, 7, "items (64, 50)", micro_batch_size=9)
    assert (found.kind, found.rank, found.step) == (kind, 1, 7)
    assert "\n" not in found.message
    if kind == "out_of_memory":
        assert "items (64, 50)" in found.message
        assert "training.micro_batch_size=3 needs 33% of the memory for activations" in found.message
        assert "training.recompute_activations=true" in describe(error, 1, 7, "items (1, 50)", micro_batch_size=1).message


def test_the_error_of_a_rank_travels_whole() -> None:
    error = TrainingError(failure("exception", 3, rank=1))
    assert pickle.loads(pickle.dumps(error)).failure == error.failure
    assert str(error) == "exception on rank 1 at step 3: it failed"


def test_the_cause_comes_before_what_follows_from_it() -> None:
    assert root_cause([failure("collective", rank=0), failure("exception", rank=1)]).rank == 1
    assert root_cause([failure("collective", rank=0), failure("worker_lost", rank=2)]).kind == "worker_lost"
    assert root_cause([failure("exception", rank=0), failure("mistake", rank=1)]).kind == "mistake"
    assert root_cause([failure("collective", rank=1), failure("collective", rank=0)]).rank == 0


def test_a_mistake_is_not_tried_again() -> None:
    assert reason_to_stop([failure("mistake")], 99)


@pytest.mark.parametrize("kind", ["exception", "not_finite", "out_of_memory"])
def test_the_same_error_at_the_same_step_is_tried_once_more_only(kind: Kind) -> None:
    assert reason_to_stop([failure(kind, 5)], 3) is None
    assert "again" in str(reason_to_stop([failure(kind, 5), failure("worker_lost"), failure(kind, 5, rank=1)], 9))
    assert reason_to_stop([failure(kind, 5), failure(kind, 6)], 3) is None


def test_what_follows_from_a_loss_that_is_no_number_can_be_chosen() -> None:
    bad = failure("not_finite", 5)
    assert reason_to_stop([bad], 3, "stop") == "training.on_non_finite = stop"
    assert reason_to_stop([bad], 3, "roll_back") is None
    assert reason_to_stop([bad], 3, "skip") is None
    assert steps_to_skip([bad, failure("worker_lost"), failure("not_finite", 3)], "skip") == (3, 5)
    assert steps_to_skip([bad], "roll_back") == ()


def test_lack_of_memory_outside_of_a_step_may_pass() -> None:
    failure = describe(MemoryError("no room"), rank=1, step=None, batch="")
    assert str(failure).startswith("out of memory on rank 1: the worker does not fit in memory (no room)")
    assert reason_to_stop([failure, failure], 3) is None


def test_exceptions_are_told_apart_by_their_types_since_texts_hold_addresses() -> None:
    first, second = failure("exception", 5, "KeyError: 0x7f01"), failure("exception", 5, "KeyError: 0x7f02")
    assert reason_to_stop([first, second], 3)
    assert reason_to_stop([first, failure("exception", 5, "ValueError: 0x7f01")], 3) is None


def test_lost_workers_count_until_there_is_a_new_checkpoint_and_preemptions_never() -> None:
    lost = [failure("worker_lost")]
    assert reason_to_stop(lost * 3, 3) is None
    assert "training.max_failures = 3" in str(reason_to_stop(lost * 4, 3))
    assert reason_to_stop([failure("preempted")] * 50, 0) is None


def test_each_start_waits_twice_as_long_as_the_one_before() -> None:
    lost = failure("worker_lost")
    assert [delay_seconds([lost] * count) for count in range(1, 12)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
