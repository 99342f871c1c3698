"""The training loop. It trains an `Objective`; DeepSpeed is in `engine.py`, saving in `checkpoints/`."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.model.text.catalogue_text import Ranks
from recsys.model.user_encoder import recompute_activations
from recsys.objectives.objective import MicroBatch, ObjectiveFactory, tensors_of
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.warm_start import begin
from recsys.train.engine import Engine, learning_rate_factor
from recsys.train.failures import Attempt, NonFiniteError, StoppedError, TrainingError, describe
from recsys.train.memory_plan import MemoryPlan, capacity, plan_step
from recsys.train.monitoring.clock import Clock
from recsys.train.monitoring.flops import flops_of
from recsys.train.monitoring.progress import Progress
from recsys.train.monitoring.reporter import Reporter, Request
from recsys.train.recovery.watchdog import Watchdog
from recsys.train.state import SCORE, TrainingState

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one rank's part of a run, from the newest checkpoint, or from `training.start_from` or random weights.

    Every rank must create one, after the process group is initialized, and call `run`.
    """

    def __init__(
        self, config: Config, dataset: Dataset, reporter: Reporter, make: ObjectiveFactory, attempt: Attempt | None = None
    ) -> None:
        self.config, self.reporter = config, reporter
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.clock = Clock(attempt or Attempt(), self.world_size)
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.training.use_gpu else torch.device("cpu")
        self.objective = make(config, dataset, self.device, Ranks(self.rank, self.world_size, dist.barrier))
        self._loss_weights = torch.tensor(list(self.objective.weights.values()), device=self.device)
        if config.training.recompute_activations:
            recompute_activations(self.objective.module)
        self.checkpoints = CheckpointStore(dataset.storage, config, dataset, self.clock.attempt.token)
        self.state = TrainingState()
        self.memory_plan: MemoryPlan | None = None
        self._opened: Iterator[Sequence[MicroBatch]] | None = None  # steps, the first one already in memory
        saved_by = self.checkpoints.newest_world_size()
        if saved_by != self.world_size:
            self._check_memory()
        moments = begin(self.objective.module, config, dataset) if config.training.start_from and not saved_by else None
        self.engine = Engine(self.objective.module, config, self.device)
        if moments is not None:
            self.engine.load_moments(moments.of, moments.step)
        self.steps_per_epoch = self.objective.plan(0).num_steps
        self.total_steps = planned_steps(config, self.steps_per_epoch)
        self.watchdog = Watchdog(config.training.hang_seconds, config.storage, config.run.name, self.clock.attempt.token, self.rank)
        self._request = Request.NONE
        self._batch: MicroBatch | None = None  # the current one; its shapes are reported if memory runs out
        torch.manual_seed(config.training.seed + 1 + self.rank)
        self._resume()
        flops = flops_of(self.objective.module, self.world_size if config.training.use_gpu else 0)
        self.progress = Progress(config, dataset.storage, self.total_steps, self.state, *flops) if self.rank == 0 else None

    def run(self) -> TrainingState:
        """Run the remaining epochs; validate, save and report after each. The best checkpoint is that of `best_step`.

        Raises:
            TrainingError: this rank failed; `failure` has the kind, message and step.
        """
        try:
            with self.progress or nullcontext(), self.checkpoints, self.watchdog:
                while not self.state.is_finished(self.config):
                    self._train_epoch()
                    self._end_epoch()
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors_of(self._batch))
            raise TrainingError(describe(error, self.rank, self.state.step, shapes, self.config.training.micro_batch_size)) from error
        return self.state

    def _check_memory(self) -> None:
        """Raise a UserError before the first step if the worker's memory is too small; count the time to read the step's samples."""
        begin = time.monotonic()
        steps = iter(self.objective.steps(0))
        batches = next(steps)
        self.state.train_seconds = self.state.data_wait_seconds = time.monotonic() - begin
        self._opened = chain([batches], steps)
        self.memory_plan = plan_step(self.objective.module, batches, self.config.training, self.world_size)
        if self.rank == 0:
            logger.debug("memory of a worker, by part:\n%s", self.memory_plan.table())
        self.memory_plan.check(*capacity(self.objective.module, self.config.training.use_gpu, self.world_size))

    def _resume(self) -> None:
        resumed = self.checkpoints.load_newest(self.engine)
        self.clock.loaded(resumed)
        if resumed is not None:
            self.state, self._opened = resumed.state, None
            if self.rank == 0:
                logger.info("resuming run %s from step %d", self.config.run.name, self.state.step)
        self.objective.load_state(self.state.objective)

    def _train_epoch(self) -> None:
        config, state, plan = self.config, self.state, self.objective.plan(self.state.epoch)
        begin = time.monotonic()
        steps, self._opened = self._opened or self.objective.steps(state.epoch, state.step_in_epoch), None
        for batches in steps:
            wait_seconds = time.monotonic() - begin
            rate_factor = learning_rate_factor(config, state.step, self.total_steps)
            self.engine.set_learning_rate(rate_factor)
            self.objective.before_step(state.step)
            losses = self._skip(batches) if state.step in self.clock.attempt.skip else self._step(batches)
            self.clock.stepped(state, wait_seconds)
            num_samples = min(plan.global_batch_size, plan.num_samples - state.step_in_epoch * plan.global_batch_size)
            state.record_step(losses, num_samples, time.monotonic() - begin, wait_seconds)
            if self.progress:
                num_tokens = self.world_size * sum(map(self.objective.num_tokens, batches))  # estimated from this rank's samples
                self.progress.step(state, losses, num_tokens, rate_factor * config.optimizer.learning_rate)
            if state.step >= self.total_steps:
                break
            if is_saving_step(state, self.steps_per_epoch, config.checkpoint.every_steps, self._request):
                self._save()
            self.checkpoints.raise_failure()
            self.watchdog.beat()
            begin = time.monotonic()

    def _step(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Run an optimizer step on this rank's micro batches; return the global mean of each loss.

        Each loss is the sum over this rank's targets divided by the number of targets on all ranks and micro batches.
        """
        names, step = list(self.objective.weights), self.state.step
        counts, asked = self._count_targets(batches)
        own_means = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for self._batch in batches:
            sums = self.engine.forward(self._batch.to(self.device))
            shares = torch.stack([sums[name] for name in names]).double() / counts
            self.engine.backward((shares * self._loss_weights).sum().float())
            own_means += shares.detach()
        means = own_means.clone()
        dist.all_reduce(means)
        losses = dict(zip(names, means.tolist(), strict=True))
        if bad := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            named = self._name_samples([] if own_means.isfinite().all() else batches)
            raise NonFiniteError(f"step {step}: loss {', '.join(bad)} is not finite{named}")
        if not self.engine.update():
            raise NonFiniteError(f"step {step}: a gradient is not finite, though the loss is{self._name_samples(batches)}")
        self._request = Request.STOP if asked[1] else Request.SAVE if asked[0] else Request.NONE
        self.reporter.step(step, losses, batches)
        return losses

    def _count_targets(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Return the number of targets of each loss on all ranks, and the numbers of ranks with a request to save and to stop."""
        request = self.reporter.request()
        asked = torch.tensor([request == Request.SAVE, request == Request.STOP], dtype=torch.float64)
        totals = torch.cat([torch.stack([batch.valid_counts() for batch in batches]).sum(0), asked]).to(self.device)
        dist.all_reduce(totals)
        return totals[:-2].clamp(min=1), totals[-2:]

    def _name_samples(self, batches: Sequence[MicroBatch]) -> str:
        """Return a text with the samples of each rank that passes `batches`. Every rank must call this."""
        found: list[str] = [""] * self.world_size
        dist.all_gather_object(found, f"; rank {self.rank} had samples {_samples(batches)}" if batches else "")
        return "".join(found)

    def _skip(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        step, samples = self.state.step, _samples(batches)
        logger.warning("step %d: skipped because its loss or gradient was not finite; samples of rank %d: %s", step, self.rank, samples)
        self.state.skipped_steps.append(step)
        self._request = Request.NONE
        return {}

    def _save(self) -> None:
        """Save in the middle of an epoch; raise StoppedError if a stop was requested."""
        self._upload()
        self.checkpoints.publish(self.clock.stamped(self.state))
        if self._request == Request.STOP:
            self._wait_until_published()
            raise StoppedError(f"run {self.config.run.name} was asked to stop; the same command continues from step {self.state.step}")

    def _end_epoch(self) -> None:
        """Validate while the checkpoint is uploaded; report after it is published."""
        state = self.state
        if state.step_in_epoch == self.steps_per_epoch:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
        self._upload()
        state.record_validation(self._validate(), self.objective.metric, self.objective.guards)
        if state.step_in_epoch == 0:
            self.objective.end_epoch(state.validation)
            state.objective = self.objective.state()
        self.checkpoints.publish(self.clock.stamped(state))
        self._wait_until_published()
        if self.progress:
            self.progress.validation(state, self.objective.metric)
        self.reporter.report({"epoch": state.epoch, "step": state.step, **state.validation, SCORE: state.score})
        self.watchdog.beat()

    def _validate(self) -> dict[str, float]:
        self.engine.train(False)
        with torch.random.fork_rng([self.device] if self.config.training.use_gpu else []):  # the checkpoint has the generators from before
            metrics = self.objective.validate()
        self.engine.train()
        return metrics

    def _upload(self) -> None:
        self.watchdog.rest()
        with self.clock.stall(self.state):
            self.checkpoints.upload(self.engine, self.state.step)

    def _wait_until_published(self) -> None:
        """Wait on every rank until rank 0 has written the manifest, because a rank that ends first would end the others."""
        with self.clock.stall(self.state):
            self.checkpoints.wait()
            dist.barrier()


def _samples(batches: Sequence[MicroBatch]) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids.tolist()]


def is_saving_step(state: TrainingState, steps_per_epoch: int, every_steps: int, request: Request) -> bool:
    """Return whether to save after this step; an epoch's last step is saved later, with its validation, unless there is a request."""
    return request != Request.NONE or (state.step % every_steps == 0 and state.step_in_epoch < steps_per_epoch)


def planned_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a whole run, without early stopping."""
    steps = config.training.epochs * steps_per_epoch
    return min(steps, config.training.max_steps or steps)
