"""The interface through which the loop reports its results; `recsys.launch.workers` implements it for Ray Train."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

from recsys.objectives.objective import MicroBatch

Metrics = dict[str, float]


class Request(IntEnum):
    """A request to the loop between two steps; the greatest of all ranks' requests applies."""

    NONE = 0
    SAVE = 1  # save a checkpoint now, since a machine will soon be gone
    STOP = 2  # save a checkpoint now, then end the run


class Reporter(Protocol):
    """Receives the results of every step and, after its checkpoint is published, of every epoch. Every rank has one."""

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Receive an optimizer step (from 0), its global losses and this rank's micro batches."""

    def request(self) -> Request:
        """Return the request to this rank since the last step; a request to one rank is enough."""

    def report(self, metrics: Metrics) -> None:
        """Receive the epoch's metrics; may wait for the other ranks."""
