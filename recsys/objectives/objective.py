"""The interface between the training loop and an objective; the other modules of this package implement it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan
from recsys.model.text.catalogue_text import Ranks


class MicroBatch(Protocol):
    """The samples of one forward and backward pass on a rank."""

    @property
    def sample_ids(self) -> Tensor:
        """The ids of the samples."""

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device."""

    def valid_counts(self) -> Tensor:
        """Return the number of targets of each loss, in the order of `Objective.weights`; float64, since they are summed over ranks."""


class Objective(Protocol):
    """A module with its batches, losses and validation. Every rank has an instance.

    The module returns the sum of each loss over a micro batch's targets, by name. The minimized loss is their sum weighted by `weights`.
    `metric` is the validation metric that selects the best checkpoint, and `guards` are the other metrics that may not fall further behind.
    Methods from `num_tokens` on are optional.
    """

    module: nn.Module
    weights: Mapping[str, float]
    metric: str
    guards: Mapping[str, float] = {}

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's samples."""

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[Sequence[Any]]:
        """Yield this rank's micro batches of each step from `first_step` to the epoch's end."""

    def validate(self) -> dict[str, float]:
        """Return the metrics of the current module in evaluation mode. Every rank must call this, and all get the same result."""

    def num_tokens(self, batch: Any) -> int:
        """Return the number of tokens that the language model reads for a micro batch; 0 if none is trained."""
        return 0

    def before_step(self, step: int) -> None:
        """Run the work that is due before a step (from 0) of the run. Every rank must call this."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Update the objective's own state from the validation after a complete epoch."""

    def state(self) -> dict[str, list[float]]:
        """Return the objective's own state, which checkpoints store; it must be the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Restore a state returned by `state`."""


ObjectiveFactory = Callable[[Config, Dataset, torch.device, Ranks], Objective]
"""Builds a rank's objective. Initial weights depend only on the config's seed. All of `Ranks` must call this."""


def tensors_of(part: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the field names and tensors of a batch, including those of nested dataclasses."""
    if isinstance(part, Tensor):
        yield name, part
    elif dataclasses.is_dataclass(part):
        for field, value in vars(part).items():
            yield from tensors_of(value, field)
