"""The config sections `optimizer`, `training`, `fairness`, `pretraining` and `checkpoint`."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.config.base import Count, Fact, Fraction, NonNegative, Positive, PositiveInt, Section


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: Annotated[Positive, Fact.SEARCHED] = 1e-3
    """Peak learning rate of all weights except the language model's."""
    backbone_learning_rate: Positive = 5e-5
    """Peak learning rate of the language model."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.98
    """Decay of the second moment."""
    warmup_steps: Count = 20
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, Field(ge=0, le=1), Fact.MAY_CHANGE] = 0.1
    """Learning rate at the end of the cosine decay, as a share of the peak."""
    clip_norm: Positive = 1.0
    """Maximum global norm of the gradients."""


class TrainingConfig(Section):
    """How a run is distributed, what it keeps in memory, how samples are read, and when it ends."""

    num_workers: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], Fact.MAY_CHANGE] = 2
    """Number of workers; `[min, max]` is elastic: the run restarts from its checkpoint when the cluster grows or shrinks."""
    use_gpu: Annotated[bool, Fact.MACHINE] = False
    """Use one GPU per worker."""
    cpus_per_worker: Annotated[Positive, Fact.MAY_CHANGE] = 1
    """CPUs that Ray reserves per worker."""
    zero_stage: Annotated[int, Field(ge=0, le=3), Fact.MACHINE] = 2
    """DeepSpeed ZeRO stage: shards nothing (0), the optimizer state (1), also gradients (2), also weights (3)."""
    offload_optimizer: Annotated[bool, Fact.MACHINE] = False
    """Keep the optimizer state in host memory and run the optimizer there; needs ZeRO 1 or higher."""
    offload_parameters: Annotated[bool, Fact.MACHINE] = False
    """Keep the weights in host memory too; needs ZeRO 3."""
    recompute_activations: Annotated[bool, Fact.MAY_CHANGE] = False
    """Activation checkpointing: keep only the inputs of Transformer layers and recompute the rest in the backward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations in the forward and backward pass."""
    global_batch_size: PositiveInt = 128
    """Samples per optimizer step, over all workers."""
    micro_batch_size: Annotated[PositiveInt, Fact.MAY_CHANGE] = 64
    """Samples per worker and backward pass; an upper limit if `num_workers` is elastic."""
    epochs: Annotated[PositiveInt, Fact.MAY_CHANGE] = 20
    """Maximum number of passes over the training data."""
    max_steps: Annotated[PositiveInt | None, Fact.MAY_CHANGE] = None
    """Maximum number of optimizer steps; unset: no limit."""
    early_stopping_patience: Annotated[PositiveInt | None, Fact.MAY_CHANGE] = 5
    """Stop after this many epochs without improvement of `evaluation.metric`."""
    start_from: Annotated[str, Fact.PATH] = ""
    """Checkpoint or export whose weights a new run begins with; rows of tables are matched by name; empty: random weights."""
    keep_optimizer: bool = False
    """Take the optimizer's state from the checkpoint in `start_from`, too; the learning rate's schedule starts anew."""
    replay: NonNegative | None = None
    """An epoch is the samples that the newest version added and so many older ones per new one, drawn anew; unset: all samples."""
    shuffle_row_groups: Count = 2
    """Samples are shuffled within windows of this many row groups of each stream; 0: no shuffling."""
    shuffle_histories: bool = False
    """Shuffle each user's interactions in every epoch, for splits without an order in time."""
    prefetch_bytes: Annotated[Count, Fact.MACHINE] = 16 << 20
    """Maximum number of bytes that are prefetched."""
    cache_bytes: Annotated[Count, Fact.MACHINE] = 8 << 30
    """Size of each node's disk cache of shards from S3."""
    max_failures: Annotated[Count, Fact.MAY_CHANGE] = 3
    """Maximum number of restarts after failures without a new checkpoint in between."""
    hang_seconds: Annotated[Positive, Fact.MAY_CHANGE] = 600.0
    """A worker whose step takes longer than this counts as failed."""
    on_non_finite: Annotated[Literal["stop", "roll_back", "skip"], Fact.MAY_CHANGE] = "roll_back"
    """On a non-finite loss: `stop`, or return to the newest checkpoint and either retry the step once (`roll_back`) or `skip` it."""
    log_every_seconds: Annotated[NonNegative, Fact.MAY_CHANGE] = 5.0
    """Interval of progress lines."""
    profile_steps: Annotated[Count, Fact.MAY_CHANGE] = 0
    """Number of steps that the first worker profiles with PyTorch's profiler."""
    seed: int = 0
    """Seed of initial weights, sample order and dropout."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        low, high = self.min_workers, self.max_workers
        if low > high:
            raise ValueError(f"training.num_workers = [{low}, {high}] must be [min, max]; [{high}, {low}] would work")
        if self.global_batch_size < high:
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size} must have a sample for each of training.num_workers = {high}; "
                f"{high} would work"
            )
        share = self.micro_batch_size * high
        if not self.is_elastic and self.global_batch_size % share:
            near = share * math.ceil(self.global_batch_size / share)
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size} must be divisible by training.micro_batch_size x "
                f"training.num_workers = {self.micro_batch_size} x {high}; {near} would work"
            )
        if self.keep_optimizer and not self.start_from:
            raise ValueError("training.keep_optimizer = true needs the checkpoint in training.start_from; false would work")
        if self.keep_optimizer and self.zero_stage == 0:
            raise ValueError("training.keep_optimizer = true needs training.zero_stage >= 1; 2 would work")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("training.offload_optimizer = true needs training.zero_stage >= 1; 2 would work")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError("training.offload_parameters = true needs training.zero_stage = 3")
        return self

    @property
    def min_workers(self) -> int:
        """Return the smallest number of workers that the run continues with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the largest number of workers that the run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Return whether the number of workers follows the size of the cluster."""
        return self.min_workers < self.max_workers

    def accumulation_steps(self, world_size: int) -> int:
        """Return how many micro batches each of `world_size` workers runs per optimizer step."""
        return math.ceil(self.global_batch_size / (self.micro_batch_size * world_size))


class FairnessConfig(Section):
    """A bound, enforced in training, on how far any group of a user attribute may fall behind in `evaluation.metric`.

    The dual variables of groups that are too small to compare stay 0. The best checkpoint is chosen by the metric over all users.
    """

    attribute: str = ""
    """User attribute that defines the groups; empty: no bound."""
    max_gap: NonNegative = 0.0
    """Largest allowed gap, as a share of the mean over the validation users."""
    dual_rate: Positive = 0.5
    """Step size of the dual variables: the weight that a group gains per epoch for each unit of relative gap above the bound."""


class PretrainingConfig(Section):
    """Pretraining of the language model on the catalogue's texts; `training` and `optimizer` apply too.

    All weights of `model.text.backbone` are trained, at `optimizer.backbone_learning_rate`, for any `model.text.mode`.
    """

    objectives: Annotated[tuple[Literal["masked", "contrastive"], ...], Field(min_length=1)] = ("masked", "contrastive")
    """`masked` predicts masked tokens (a decoder: the next token); `contrastive` matches texts of items that the same users took."""
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of tokens that are masked."""
    temperature: Positive = 0.05
    """Temperature of the contrastive loss."""
    window: PositiveInt = 3
    """Maximum distance, in interactions, between the two items of a contrastive pair."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: PositiveInt = 200
    """Optimizer steps between checkpoints; one is also written after each epoch."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
