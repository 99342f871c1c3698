"""The one training loop; what it trains is `trainable.py`'s, sharding is in `engine.py`, saving in `checkpoint.py`."""

import logging
import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.model.catalogue_text import Ranks
from recsys.train.checkpoint import CheckpointStore
from recsys.train.engine import Engine
from recsys.train.progress import Progress
from recsys.train.recommending import Recommending
from recsys.train.reporter import Reporter
from recsys.train.state import TrainingState
from recsys.train.trainable import MakeTrainable, MicroBatch

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the step that gave it changed no weight."""


def train(config: Config, dataset: Dataset, reporter: Reporter, make: MakeTrainable = Recommending) -> TrainingState:
    """Train from the newest checkpoint, or from the start, to the end; every rank must call this.

    The process group must be initialised. Returns the final state; the best checkpoint is that of `best_step`.
    """
    return Trainer(config, dataset, reporter, make).run()


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, dataset: Dataset, reporter: Reporter, make: MakeTrainable = Recommending) -> None:
        self.config, self.reporter = config, reporter
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.training.use_gpu else torch.device("cpu")
        self.trainable = make(config, dataset, self.device, Ranks(self.rank, self.world_size, dist.barrier))
        self.weights = self.trainable.weights
        self.engine = Engine(self.trainable.module, config, self.device)
        self.engine.train()  # a language model that was loaded comes in evaluation mode
        self.total_steps = planned_steps(config, self.trainable.plan(0).num_steps)
        self.checkpoints = CheckpointStore(dataset.storage, config, dataset)
        torch.manual_seed(config.training.seed + 1 + self.rank)
        newest = self.checkpoints.newest()
        self.state = self.checkpoints.load(self.engine, newest) if newest else TrainingState()
        if newest and self.rank == 0:
            logger.info("resuming run %s from step %d", config.run.name, self.state.step)
        self.trainable.restore(self.state)
        self.progress = Progress(config, dataset.storage, self.total_steps, self.state.step) if self.rank == 0 else None

    def run(self) -> TrainingState:
        """Go through the epochs that are left; validate, save and report after each."""
        config, state = self.config, self.state
        steps_per_epoch = self.trainable.plan(0).num_steps
        while not state.is_finished(config):
            waiting_since = time.monotonic()
            for batches in self.trainable.steps(state.epoch, state.step_in_epoch):
                loaded_at = time.monotonic()
                rate_factor = learning_rate_factor(config, state.step, self.total_steps)
                self.engine.set_learning_rate(rate_factor)
                losses = self._step(batches)
                num_samples = self._count_step(time.monotonic() - waiting_since, loaded_at - waiting_since)
                if self.progress:
                    self.progress.step(state, losses, num_samples, loaded_at - waiting_since, rate_factor * config.optimizer.learning_rate)
                if state.step >= self.total_steps:
                    break
                if is_saving_step(state, steps_per_epoch, config.checkpoint.every_steps):
                    self.checkpoints.save(self.engine, state)
                waiting_since = time.monotonic()
            if state.step_in_epoch == steps_per_epoch:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
            state.record_validation(self._validate(), self.trainable.metric)
            self.trainable.after_validation(state)
            self.checkpoints.save(self.engine, state)
            if self.progress:
                self.progress.validation(state, self.trainable.metric)
            self.reporter.report({"epoch": state.epoch, "step": state.step, **state.validation})
        if self.progress:
            self.progress.close()
        return state

    def _step(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Run one optimizer step over this rank's micro batches; return the global mean of each loss.

        Each loss is the sum over this rank's targets divided by the number of targets on all ranks and micro batches.
        """
        counts = self._sum_over_ranks(torch.stack([batch.valid_counts() for batch in batches]).sum(0)).clamp(min=1)
        means = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches, start=1):
            sums = self.engine.forward(batch.to(self.device))
            shares = torch.stack([sums[name] for name in self.weights]).double() / counts
            self.engine.backward((shares * torch.tensor(list(self.weights.values()), device=self.device)).sum().float())
            means += shares.detach()
            if number == len(batches):
                means = self._sum_over_ranks(means)
                self._refuse_non_finite(means, batches)
            self.engine.end_micro_batch()
        result = dict(zip(self.weights, means.tolist(), strict=True))
        self.reporter.step(self.state.step, result, batches)
        return result

    def _count_step(self, seconds: float, wait_seconds: float) -> int:
        state, plan = self.state, self.trainable.plan(self.state.epoch)
        num_samples = min(plan.global_batch_size, plan.num_samples - state.step_in_epoch * plan.global_batch_size)
        state.step += 1
        state.step_in_epoch += 1
        state.samples_seen += num_samples
        state.train_seconds += seconds
        state.data_wait_seconds += wait_seconds
        return num_samples

    def _validate(self) -> dict[str, float]:
        self.engine.train(False)
        metrics = self.trainable.validate()
        self.engine.train()
        return metrics

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def _refuse_non_finite(self, means: Tensor, batches: Sequence[MicroBatch]) -> None:
        """Raise before the optimizer sees the gradients of a loss that is no number."""
        if not bool(means.isfinite().all()):
            bad = [name for name, mean in zip(self.weights, means.tolist(), strict=True) if not math.isfinite(mean)]
            ids = [sample for batch in batches for sample in batch.sample_ids.tolist()]
            raise NonFiniteLossError(
                f"step {self.state.step}: loss {', '.join(bad)} is not finite; rank {self.rank} had samples {ids[:20]}"
            )


def is_saving_step(state: TrainingState, steps_per_epoch: int, every_steps: int) -> bool:
    """Tell whether the loop saves after this step; an epoch's last step is saved later, with its validation."""
    return state.step % every_steps == 0 and state.step_in_epoch < steps_per_epoch


def planned_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a whole run, early stopping aside."""
    steps = config.training.epochs * steps_per_epoch
    return min(steps, config.training.max_steps or steps)


def learning_rate_factor(config: Config, step: int, total_steps: int) -> float:
    """Return the rate of a step (from 0) over its peak: linear warm-up, then cosine decay to `final_fraction`."""
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    return optimizer.final_fraction + (1 - optimizer.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
