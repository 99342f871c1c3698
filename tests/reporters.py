"""A reporter for runs without Ray: it keeps what it is told."""

from collections.abc import Sequence

from recsys.objectives.objective import MicroBatch
from recsys.train.monitoring.reporter import Metrics, Request


class LocalReporter:
    """Keeps what it is told: for runs without Ray, and for tests."""

    def __init__(self) -> None:
        self.history: list[Metrics] = []
        self.losses: list[Metrics] = []

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Keep the losses."""
        self.losses.append(losses)

    def request(self) -> Request:
        """Ask for nothing."""
        return Request.NONE

    def report(self, metrics: Metrics) -> None:
        """Keep the metrics."""
        self.history.append(metrics)
