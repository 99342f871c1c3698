"""The interface by which the loop reports its results; the reporter of Ray Train is in `recsys.launch.workers`."""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

from recsys.objectives.objective import MicroBatch

Metrics = dict[str, float]


class Request(IntEnum):
    """What the loop may be asked for between two steps; of several ranks' requests the greatest is followed."""

    NONE = 0
    SAVE = 1  # a checkpoint now, since a machine will soon be gone
    STOP = 2  # a checkpoint now, and no step more


class Reporter(Protocol):
    """Told of every step, and once an epoch, by every rank, after its checkpoint is published."""

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Take note of an optimizer step (from 0), its global losses and what this rank read for it."""

    def request(self) -> Request:
        """Return what this rank was asked for since the last step; it is enough to ask one rank."""

    def report(self, metrics: Metrics) -> None:
        """Hand on the epoch's metrics; may wait for the other ranks."""
