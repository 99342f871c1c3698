"""Progress lines, TensorBoard scalars, trackers and the profile of a run."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from recsys.config import Config
from recsys.errors import StoreError
from recsys.store import Storage, private_folder
from recsys.train.failures import StoppedError
from recsys.train.monitoring.profiling import step_profiler
from recsys.train.monitoring.trackers import Trackers
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)


class Progress:
    """Reports a run by a line every few seconds, TensorBoard, trackers and a profile. Used on rank 0, as a context around its steps.

    With `flops_per_token` of the language model and `peak_flops` of the run's GPUs, the line includes MFU.
    """

    def __init__(
        self,
        config: Config,
        storage: Storage,
        total_steps: int,
        state: TrainingState,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        self._config, self._storage, self._total = config, storage, total_steps
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._metric = config.evaluation.metric
        self._target = storage.uri("runs", config.run.name, "tensorboard")
        self._folder = private_folder(Path(config.run.scratch) / "tensorboard" / config.run.name)
        self._writer = SummaryWriter(str(self._folder), purge_step=state.step or None)  # repeated steps are shown once
        self._trackers = Trackers(config)
        self._profiler = step_profiler(config, storage) if config.training.profile_steps else None
        self._first_step, self._since = state.step, state.model_copy()
        self._begin = self._last_line = time.monotonic()
        self._tokens, self._result = 0, ""

    def __enter__(self) -> Self:
        if self._profiler:
            self._profiler.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._profiler:
            self._profiler.stop()
        if error_type in (None, StoppedError):
            self.close()

    def step(self, state: TrainingState, losses: dict[str, float], num_tokens: int, learning_rate: float) -> None:
        """Record the optimizer step just counted in `state`; `num_tokens` is the number of tokens read by the language model."""
        self._tokens += num_tokens
        values = {f"loss/{name}": value for name, value in losses.items()} | {"learning_rate": learning_rate}
        self._write(values, state.step)
        if self._profiler:
            self._profiler.step()
        now = time.monotonic()
        if now - self._last_line >= self._config.training.log_every_seconds or state.step == self._total:
            speeds = self._speeds(state, max(now - self._last_line, 1e-9))
            self._print(state, losses, speeds, now)
            rates = {f"speed/{name}": value for name, value in speeds.items()}
            self._write(rates, state.step)
            self._trackers.send(rates | values, state.step)
            self._last_line, self._since, self._tokens = now, state.model_copy(), 0

    def validation(self, state: TrainingState, metric: str) -> None:
        """Record an epoch's validation and upload the TensorBoard files to the store."""
        self._metric, epochs = metric, self._config.training.epochs
        values = {f"validation/{name}": value for name, value in state.validation.items()}
        self._write(values, state.step)
        self._trackers.send(values, state.step)
        broken = state.history[-1].broken_guards if state.history else ()
        best = " (best)" if state.best_step == state.step else f" (breaks evaluation.guards: {', '.join(broken)})" if broken else ""
        logger.debug("epoch %d/%d | validation %s %.4f%s", state.epoch, epochs, metric, state.validation[metric], best)
        reached = f"{state.best_metric:.4f} at step {state.best_step}" if state.best_metric is not None else "unknown"
        self._result = f"{state.epoch} of {epochs} epochs; best validation {metric} {reached}"
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """Close the TensorBoard file and upload it, and close the trackers."""
        if self._result:
            logger.info("trained %s", self._result)
        self._writer.close()
        self._upload()
        self._trackers.close()

    def _upload(self) -> None:
        with suppress(StoreError):  # the next upload includes everything
            for path in filter(Path.is_file, self._folder.iterdir()):
                self._storage.upload(path, f"{self._target}/{path.name}")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _speeds(self, state: TrainingState, seconds: float) -> dict[str, float]:
        since = self._since
        speeds = {"samples/s": (state.samples_seen - since.samples_seen) / seconds}
        if self._tokens:
            speeds["tokens/s"] = self._tokens / seconds
        if self._tokens and self._peak_flops:
            speeds["MFU %"] = 100 * self._tokens / seconds * self._flops_per_token / self._peak_flops
        speeds["data wait %"] = 100 * (state.data_wait_seconds - since.data_wait_seconds) / seconds
        speeds["checkpoint stall %"] = 100 * (state.checkpoint_stall_seconds - since.checkpoint_stall_seconds) / seconds
        return speeds

    def _print(self, state: TrainingState, losses: dict[str, float], speeds: dict[str, float], now: float) -> None:
        remaining = (now - self._begin) / max(1, state.step - self._first_step) * (self._total - state.step)
        parts = [
            f"{bar(state.step, self._total)} step {state.step}/{self._total} | epoch {state.epoch + 1}/{self._config.training.epochs}",
            "loss " + " ".join(f"{name} {value:.4f}" for name, value in losses.items()),
            *([f"{self._metric} {state.validation[self._metric]:.4f}"] if self._metric in state.validation else []),
            *(f"{value:.{1 if '%' in name else 0}f} {name}" for name, value in speeds.items()),
            "ETA {}:{:02d}".format(*divmod(int(remaining), 60)),
        ]
        logger.info("%s", " | ".join(parts))


def bar(done: int, total: int, width: int = 20) -> str:
    """Return a progress bar."""
    filled = width * done // max(1, total)
    return "█" * filled + "·" * (width - filled)
