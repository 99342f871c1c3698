"""Where the loop tells its results: to a scheduler, or to nobody but the caller. Ray's own is in `recsys.launch`."""

from collections.abc import Sequence
from typing import Protocol

from recsys.train.trainable import MicroBatch

Metrics = dict[str, float]


class Reporter(Protocol):
    """Told of every step, and once an epoch, by every rank, after its checkpoint is published."""

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Take note of an optimizer step (from 0), its global losses and what this rank read for it."""

    def report(self, metrics: Metrics) -> None:
        """Hand on the epoch's metrics; may wait for the other ranks."""


class LocalReporter:
    """Keeps what it is told: for runs without Ray, and for tests."""

    def __init__(self) -> None:
        self.history: list[Metrics] = []
        self.losses: list[Metrics] = []

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Keep the losses."""
        self.losses.append(losses)

    def report(self, metrics: Metrics) -> None:
        """Keep the metrics."""
        self.history.append(metrics)
