"""Kinds of failures, and pure functions that decide how to react to them."""

import time
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from pydantic import BaseModel, Field

from recsys.errors import StoreError, UserError

Explained = Literal["stopped", "mistake", "not_finite", "out_of_memory", "store"]
"""Kinds whose message explains the failure without a traceback."""

Kind = Literal[Explained, "exception", "preempted", "resized", "hang", "node_lost", "worker_lost", "driver_lost", "collective"]
"""When one rank fails, the others fail too: kinds listed earlier here are causes of later ones."""

LONGEST_DELAY_SECONDS = 60.0


class Failure(BaseModel, frozen=True, extra="forbid"):
    """The failure that ended an attempt: its kind, a one-line message and, if known, the rank and the step."""

    kind: Kind
    message: str
    rank: int | None = None
    step: int | None = None

    @property
    def is_explained(self) -> bool:
        """Return whether the message explains the failure without a traceback."""
        return self.kind in get_args(Explained)

    @property
    def is_deterministic(self) -> bool:
        """Return whether a restart would fail in the same way; out of memory without a step may be due to other processes."""
        return self.kind in ("exception", "not_finite") or (self.kind == "out_of_memory" and self.step is not None)

    @property
    def what(self) -> tuple[str, str, int | None]:
        """The key by which failures are equal: not the whole message, which may contain addresses, but its exception type."""
        return self.kind, self.message.partition(":")[0] if self.kind == "exception" else "", self.step

    def __str__(self) -> str:
        """Return one line, for example `worker lost on rank 1: ...`."""
        place = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.kind.replace('_', ' ')}{place}{'' if self.step is None else f' at step {self.step}'}: {self.message}"


class Attempt(BaseModel, frozen=True, extra="forbid"):
    """One start of a group of workers: the owner's token, since when it owns the run, and why and when the workers were started.

    `lost_at` is the last heartbeat of the previous owner, if it died. Steps in `skip` make no update. If `given_up` has a reason, workers
    are not started, and the last cause ended the run. Times are seconds since 1970.
    """

    token: int = 0
    causes: tuple[Failure, ...] = ()
    skip: tuple[int, ...] = ()
    owned_since: float = Field(default_factory=time.time)
    lost_at: float | None = None
    started_at: float = Field(default_factory=time.time)
    given_up: str | None = None


class TrainingError(RuntimeError):
    """Carries a rank's failure to the process that started the rank."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class StoppedError(Exception):
    """The run was asked to stop; a checkpoint of its last step is published."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the step did not change any weight."""


def describe(error: BaseException, rank: int, step: int | None, batch: str, micro_batch_size: int = 1) -> Failure:
    """Return the `Failure` of an exception in the training loop; `batch` has the shapes of the rank's current micro batch, if any."""
    message = " ".join(str(error).split())
    if isinstance(error, StoreError):
        kind: Kind = "store"
    elif isinstance(error, UserError):
        kind = "mistake"
    elif isinstance(error, StoppedError):
        kind = "stopped"
    elif isinstance(error, NonFiniteError):
        kind = "not_finite"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in message:
        what = f"micro batch of {batch} does not fit in memory" if batch else "the worker does not fit in memory"
        kind, message = "out_of_memory", f"{what} ({message[:200]}); {_way_to_fit(micro_batch_size)}"
    elif "gloo" in message or "Connection closed by peer" in message or type(error).__name__.startswith("Dist"):
        kind = "collective"
    else:
        kind, message = "exception", f"{type(error).__name__}: {message}"
    return Failure(kind=kind, message=message, rank=rank, step=step)


def _way_to_fit(micro_batch_size: int) -> str:
    """Return advice to save memory: the next smaller divisor of the micro batch, which also divides the global batch."""
    smaller = max((size for size in range(1, micro_batch_size) if micro_batch_size % size == 0), default=None)
    if smaller is None:
        return "set training.recompute_activations=true, or raise training.zero_stage or training.num_workers"
    return f"training.micro_batch_size={smaller} needs {smaller / micro_batch_size:.0%} of the memory for activations"


def root_cause(failures: Iterable[Failure]) -> Failure:
    """Return the failure that caused the others, among those of one attempt's ranks."""
    return min(failures, key=lambda failure: (get_args(Kind).index(failure.kind), failure.rank or 0))


def steps_to_skip(failures: Sequence[Failure], on_non_finite: str) -> tuple[int, ...]:
    """Return the steps that make no update after a restart: those that were not finite, if `on_non_finite` is `skip`."""
    bad = {failure.step for failure in failures if failure.kind == "not_finite" and failure.step is not None}
    return tuple(sorted(bad)) if on_non_finite == "skip" else ()


def reason_to_stop(failures: Sequence[Failure], max_failures: int, on_non_finite: str = "roll_back") -> str | None:
    """Return why a run should not restart, given its failures since its newest checkpoint or the start; None to restart."""
    last = failures[-1]
    if last.kind in ("stopped", "mistake"):
        return "a restart would not help"
    if last.kind == "not_finite" and on_non_finite == "stop":
        return "training.on_non_finite = stop"
    if last.is_deterministic and last.what in [failure.what for failure in failures[:-1]]:
        return "it fails at the same step in the same way again"
    counted = [failure for failure in failures if failure.kind != "preempted"]
    if len(counted) > max_failures:
        return f"training.max_failures = {max_failures}: it failed {len(counted)} times without a new checkpoint between"
    return None


def delay_seconds(failures: Sequence[Failure]) -> float:
    """Return the delay before the next start: 0 after the first failure since a checkpoint, then 1, 2, 4, ... s, with a limit."""
    return 0.0 if len(failures) <= 1 else min(2.0 ** (len(failures) - 2), LONGEST_DELAY_SECONDS)
