"""What the training loop asks of an objective; the objectives are the other modules of this package."""

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
    """What a rank trains on between two backward passes."""

    @property
    def sample_ids(self) -> Tensor:
        """Which samples these are."""

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""

    def valid_counts(self) -> Tensor:
        """Count the targets of each loss, in the order of `Objective.weights`, in float64 since they are summed over ranks."""


class Objective(Protocol):
    """A module, the batches and losses that it is trained with, and its validation; every rank has one.

    The module returns the sum of each loss over a micro batch's targets, by name; `weights` are the losses' in the sum that is minimised.
    `metric` is the validation metric that chooses the best checkpoint; higher is better. All from `num_tokens` on need not be implemented.
    """

    module: nn.Module
    weights: Mapping[str, float]
    metric: str

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's samples."""

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[Sequence[Any]]:
        """Yield this rank's micro batches of each step from `first_step` to the epoch's end."""

    def validate(self) -> dict[str, float]:
        """Return the metrics of the module as it is, in evaluation mode; every rank must call this, and all get the same."""

    def num_tokens(self, batch: Any) -> int:
        """Count the tokens that the language model reads for a micro batch; 0 where none is trained."""
        return 0

    def before_step(self, step: int) -> None:
        """Do what is due before a step (from 0) of the run; every rank must call this."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Update the objective's own state from the validation after a whole epoch."""

    def state(self) -> dict[str, list[float]]:
        """Return the objective's own state, which checkpoints keep; it is the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Restore what `state` returned."""


MakeObjective = Callable[[Config, Dataset, torch.device, Ranks], Objective]
"""Builds a rank's objective; its initial weights depend on the config's seed alone. All of `Ranks` must call this."""


def tensors_of(part: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch, or of a dataclass in it, with the names of their fields."""
    if isinstance(part, Tensor):
        yield name, part
    elif dataclasses.is_dataclass(part):
        for field, value in vars(part).items():
            yield from tensors_of(value, field)
