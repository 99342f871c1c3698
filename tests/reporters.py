"""A reporter for runs without Ray."""

from collections.abc import Sequence

from recsys.objectives.objective import MicroBatch
from recsys.train.monitoring.reporter import Metrics, Request


class LocalReporter:
    """Keeps losses and metrics in lists, for runs without Ray and for tests."""

    def __init__(self) -> None:
        self.history: list[Metrics] = []
        self.losses: list[Metrics] = []

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        self.losses.append(losses)

    def request(self) -> Request:
        return Request.NONE

    def report(self, metrics: Metrics) -> None:
        self.history.append(metrics)
