"""The training loop. What it trains is an `Objective`; DeepSpeed is in `engine.py`, saving in `checkpoints/`."""

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.model.text.catalogue_text import Ranks
from recsys.model.text.encoder import TextEncoder
from recsys.model.user_encoder import recompute_activations
from recsys.objectives.objective import MakeObjective, MicroBatch, shapes_of
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.engine import Engine
from recsys.train.failures import NonFiniteError, StoppedError, TrainingError, describe
from recsys.train.monitoring.clock import Attempt, Clock
from recsys.train.monitoring.flops import flops_per_token, peak_flops
from recsys.train.monitoring.memory import MemoryPlan, device_bytes, plan_step
from recsys.train.monitoring.profiling import Profile
from recsys.train.monitoring.progress import Progress
from recsys.train.monitoring.reporter import Reporter, Request
from recsys.train.recovery.watchdog import Watchdog
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)


def train(config: Config, dataset: Dataset, reporter: Reporter, make: MakeObjective, attempt: Attempt | None = None) -> TrainingState:
    """Train from the newest checkpoint, or from the start, to the end; every rank must call this.

    The process group must be initialised. Returns the final state; the best checkpoint is that of `best_step`.

    Raises:
        TrainingError: this rank failed; what it was, and at which step, is in its `failure`.
    """
    return Trainer(config, dataset, reporter, make, attempt).run()


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        reporter: Reporter,
        make: MakeObjective,
        attempt: Attempt | None = None,
    ) -> None:
        self.config, self.reporter = config, reporter
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        clock = Clock(attempt or Attempt(), self.world_size)
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.training.use_gpu else torch.device("cpu")
        self.objective = make(config, dataset, self.device, Ranks(self.rank, self.world_size, dist.barrier))
        self.weights = self.objective.weights
        if config.training.recompute_activations:
            recompute_activations(self.objective.module)
        self.checkpoints = CheckpointStore(dataset.storage, config, dataset, clock.attempt.token)
        self.memory_plan: MemoryPlan | None = None
        self._begun_steps: Iterator[Sequence[MicroBatch]] | None = None
        has_fitted = self.checkpoints.newest_world_size() == self.world_size
        waited_seconds = 0.0 if has_fitted else self._check_memory()
        self.engine = Engine(self.objective.module, config, self.device)
        self.engine.train()  # a language model that was loaded comes in evaluation mode
        self.steps_per_epoch = self.objective.plan(0).num_steps
        self.total_steps = planned_steps(config, self.steps_per_epoch)
        self.watchdog = Watchdog(config.training.hang_seconds, config.storage, config.run.name, clock.attempt.token, self.rank)
        self._request = Request.NONE
        self._batch: MicroBatch | None = None  # the one under way, for whoever asks what did not fit
        torch.manual_seed(config.training.seed + 1 + self.rank)
        resumed = self.checkpoints.load_newest(self.engine)
        if resumed:
            self._begun_steps = None
        self.state = resumed.state if resumed else TrainingState(train_seconds=waited_seconds, data_wait_seconds=waited_seconds)
        clock.loaded(resumed)
        self.clock = clock
        if resumed and self.rank == 0:
            logger.info("resuming run %s from step %d", config.run.name, self.state.step)
        self.objective.load_state(self.state.objective)
        self.progress = self._progress(dataset.storage) if self.rank == 0 else None
        self.profile = Profile(config, dataset.storage) if self.rank == 0 and config.training.profile_steps else None

    def run(self) -> TrainingState:
        """Go through the epochs that are left; validate, save and report after each."""
        try:
            with self.checkpoints, self.watchdog, self.profile or nullcontext():
                while not self.state.is_finished(self.config):
                    self._train_epoch()
                    self._end_epoch()
        except Exception as error:
            size = self.config.training.micro_batch_size
            raise TrainingError(describe(error, self.rank, self.state.step, shapes_of(self._batch), size)) from error
        if self.progress:
            self.progress.close()
        return self.state

    def _progress(self, storage: Storage) -> Progress:
        encoder = next((part for part in self.objective.module.modules() if isinstance(part, TextEncoder)), None)
        flops = 0.0 if encoder is None else flops_per_token(encoder.backbone)
        peak = peak_flops(torch.cuda.get_device_name()) * self.world_size if self.config.training.use_gpu else 0.0
        return Progress(self.config, storage, self.total_steps, self.state, flops, peak)

    def _check_memory(self) -> float:
        """Refuse, before the first step, what a worker cannot hold; return how long the step's samples were waited for."""
        begin = time.monotonic()
        steps = iter(self.objective.steps(0))
        batches = next(steps)
        waited_seconds = time.monotonic() - begin
        self._begun_steps = chain([batches], steps)
        self.memory_plan = plan_step(self.objective.module, batches, self.config.training, self.world_size)
        if self.rank == 0:
            logger.debug("memory of a worker, by part:\n%s", self.memory_plan.table())
        self.memory_plan.check(*self._capacity())
        return waited_seconds

    def _capacity(self) -> tuple[int, str]:
        """Return how many bytes of the plan this rank can hold, with the weights that it holds already, and where."""
        free, where = device_bytes(self.config.training.use_gpu, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))
        is_held = not self.config.training.use_gpu
        return free + is_held * sum(parameter.nbytes for parameter in self.objective.module.parameters()), where

    def _train_epoch(self) -> None:
        """Make the steps that are left of the epoch, or of the run."""
        config, state = self.config, self.state
        waiting_since = time.monotonic()
        steps, self._begun_steps = self._begun_steps or self.objective.steps(state.epoch, state.step_in_epoch), None
        for batches in steps:
            loaded_at = time.monotonic()
            rate_factor = learning_rate_factor(config, state.step, self.total_steps)
            self.engine.set_learning_rate(rate_factor)
            self.objective.before_step(state.step)
            losses = self._skip(batches) if state.step in self.clock.attempt.skip else self._step(batches)
            self._count_step(losses, time.monotonic() - waiting_since, loaded_at - waiting_since)
            if self.progress:
                self.progress.step(state, losses, self._tokens(batches), rate_factor * config.optimizer.learning_rate)
            if self.profile:
                self.profile.step()
            if state.step >= self.total_steps:
                break
            if is_saving_step(state, self.steps_per_epoch, config.checkpoint.every_steps, self._request):
                self._upload()
                self._publish()
                if self._request == Request.STOP:
                    self._stop()
            self.checkpoints.raise_failure()
            self.watchdog.beat()
            waiting_since = time.monotonic()

    def _end_epoch(self) -> None:
        """Validate while the checkpoint is uploaded; report when it is published."""
        self.watchdog.rest()
        state = self.state
        if state.step_in_epoch == self.steps_per_epoch:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
        self._upload()
        state.record_validation(self._validate(), self.objective.metric)
        if state.step_in_epoch == 0:
            self.objective.end_epoch(state.validation)
            state.objective = self.objective.state()
        self._publish()
        self._wait_until_published()
        if self.progress:
            self.progress.validation(state, self.objective.metric)
        self.reporter.report({"epoch": state.epoch, "step": state.step, **state.validation})
        self.watchdog.beat()

    def _stop(self) -> None:
        self._wait_until_published()
        if self.progress:
            self.progress.close()
        raise StoppedError(f"run {self.config.run.name} was asked to stop; the same command goes on from step {self.state.step}")

    def _wait_until_published(self) -> None:
        """Wait for the checkpoint on every rank: the manifest is rank 0's, and the first rank that ends takes the others with it."""
        with self._stall():
            self.checkpoints.wait()
            dist.barrier()

    def _upload(self) -> None:
        self.watchdog.rest()
        with self._stall():
            self.checkpoints.upload(self.engine, self.state.step)

    def _publish(self) -> None:
        self.clock.stamp(self.state)
        self.checkpoints.publish(self.state)

    @contextmanager
    def _stall(self) -> Iterator[None]:
        """Count the block as time that a checkpoint held training up."""
        begin = time.monotonic()
        yield
        self.state.checkpoint_stall_seconds += time.monotonic() - begin

    def _skip(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Pass a step's samples by, without an update."""
        logger.warning(
            "step %d: its loss was not finite, so its samples are left out; rank %d had %s", self.state.step, self.rank, _samples(batches)
        )
        self.state.skipped_steps.append(self.state.step)
        self._request = Request.NONE
        return {}

    def _step(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Run one optimizer step over this rank's micro batches; return the global mean of each loss.

        Each loss is the sum over this rank's targets divided by the number of targets on all ranks and micro batches.
        """
        wanted = self.reporter.request()
        asked = torch.tensor([wanted == request for request in (Request.SAVE, Request.STOP)], dtype=torch.float64)
        counts = self._sum_over_ranks(torch.cat([torch.stack([batch.valid_counts() for batch in batches]).sum(0), asked]))
        asked, counts = counts[-2:], counts[:-2].clamp(min=1)
        means = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches, start=1):
            self._batch = batch
            sums = self.engine.forward(batch.to(self.device))
            shares = torch.stack([sums[name] for name in self.weights]).double() / counts
            self.engine.backward((shares * torch.tensor(list(self.weights.values()), device=self.device)).sum().float())
            means += shares.detach()
            if number == len(batches):
                is_finite_here = bool(means.isfinite().all())
                means = self._sum_over_ranks(means)
                self._refuse_non_finite(means, is_finite_here, batches)
            is_updated = self.engine.end_micro_batch()
        if not is_updated:
            raise NonFiniteError(f"step {self.state.step}: a gradient is not finite, though the loss is{self._name_samples(batches)}")
        result = dict(zip(self.weights, means.tolist(), strict=True))
        self._request = Request.STOP if asked[1] else Request.SAVE if asked[0] else Request.NONE
        self.reporter.step(self.state.step, result, batches)
        return result

    def _count_step(self, losses: dict[str, float], seconds: float, wait_seconds: float) -> None:
        self.clock.stepped(self.state, wait_seconds)
        state, plan = self.state, self.objective.plan(self.state.epoch)
        num_samples = min(plan.global_batch_size, plan.num_samples - state.step_in_epoch * plan.global_batch_size)
        state.record_step(losses, num_samples, seconds, wait_seconds)

    def _tokens(self, batches: Sequence[MicroBatch]) -> int:
        """Count what the language model read for a step, on all ranks, by this rank's share of the samples."""
        return self.world_size * sum(self.objective.num_tokens(batch) for batch in batches)

    def _validate(self) -> dict[str, float]:
        self.engine.train(False)
        with torch.random.fork_rng([self.device] if self.config.training.use_gpu else []):  # its draws are after what was saved
            metrics = self.objective.validate()
        self.engine.train()
        return metrics

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def _refuse_non_finite(self, means: Tensor, is_finite_here: bool, batches: Sequence[MicroBatch]) -> None:
        """Raise on every rank, before the optimizer sees gradients of a loss that is no number."""
        if bool(means.isfinite().all()):
            return
        bad = [name for name, mean in zip(self.weights, means.tolist(), strict=True) if not math.isfinite(mean)]
        raise NonFiniteError(
            f"step {self.state.step}: loss {', '.join(bad)} is not finite{self._name_samples([] if is_finite_here else batches)}"
        )

    def _name_samples(self, batches: Sequence[MicroBatch]) -> str:
        """Say which ranks had which of a step's samples, of those that give any; every rank must call this."""
        found: list[str] = [""] * self.world_size
        dist.all_gather_object(found, f"; rank {self.rank} had samples {_samples(batches)}" if batches else "")
        return "".join(found)


def _samples(batches: Sequence[MicroBatch]) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids.tolist()]


def is_saving_step(state: TrainingState, steps_per_epoch: int, every_steps: int, request: Request) -> bool:
    """Return whether the loop saves after this step; an epoch's last step is saved later, with its validation, unless that is asked for."""
    return request != Request.NONE or (state.step % every_steps == 0 and state.step_in_epoch < steps_per_epoch)


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
