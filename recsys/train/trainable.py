"""What the training loop asks of the thing that it trains; `recommending.py` and `pretraining.py` are the two things."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan
from recsys.model.catalogue_text import Ranks
from recsys.train.state import TrainingState


class MicroBatch(Protocol):
    """What a rank trains on between two backward passes."""

    @property
    def sample_ids(self) -> Tensor:
        """Which samples these are."""

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""

    def valid_counts(self) -> Tensor:
        """Count the targets of each loss, in the order of `Trainable.weights`, in float64 since they are summed over ranks."""


def shapes_of(batch: object) -> str:
    """List the shapes of a batch's tensors, such as `targets (640,)`."""
    parts = vars(batch).items() if dataclasses.is_dataclass(batch) else ()
    shapes = [f"{name} {tuple(part.shape)}" if isinstance(part, Tensor) else shapes_of(part) for name, part in parts]
    return ", ".join(filter(None, shapes))


class Trainable(Protocol):
    """A module, the steps that it learns from, and how it is judged; every rank has one.

    The module gives the sum of each loss over a micro batch's targets, by name.
    """

    @property
    def module(self) -> nn.Module:
        """What learns."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each loss, how much it counts in the sum that is minimised."""

    @property
    def metric(self) -> str:
        """The validation's metric that chooses the best checkpoint; higher is better."""

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's samples."""

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[Sequence[Any]]:
        """Yield this rank's micro batches of each step from `first_step` to the epoch's end."""

    def before_step(self, step: int) -> None:
        """Do what is due before a step (from 0) of the run; every rank must call this."""

    def num_tokens(self, batch: Any) -> int:
        """Count the tokens that the language model reads for a micro batch; 0 where none is trained."""

    def restore(self, state: TrainingState) -> None:
        """Take over what the state has of a run that goes on, besides the module's weights."""

    def validate(self) -> dict[str, float]:
        """Return the metrics of the module as it is, in evaluation mode; every rank must call this, and all get the same."""

    def after_validation(self, state: TrainingState) -> None:
        """Note in the state what follows from its validation for the epochs to come."""


class MakeTrainable(Protocol):
    """Builds what a run trains, with weights that depend on the config's seed alone; all of `ranks` must call this."""

    def __call__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> Trainable:
        """Build it for this rank."""
