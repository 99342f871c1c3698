"""What a person sees of a run: lines on stderr and TensorBoard files; nothing here changes the training."""

import logging
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from recsys.config import Config
from recsys.storage import Storage, private_folder
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)


class Progress:
    """Counts samples and waiting, prints a line every few seconds, and writes TensorBoard scalars. For rank 0."""

    def __init__(self, config: Config, storage: Storage, total_steps: int, first_step: int) -> None:
        self._every = config.training.log_every_seconds
        self._epochs = config.training.epochs
        self._total = total_steps
        self._storage = storage
        self._target = storage.uri("runs", config.run.name, "tensorboard")
        self._folder = private_folder(Path(config.run.scratch) / "tensorboard" / config.run.name)
        self._writer = SummaryWriter(str(self._folder))
        self._first_step = first_step
        self._begin = self._last_line = time.monotonic()
        self._line_samples = 0
        self._line_wait = 0.0

    def step(self, state: TrainingState, losses: dict[str, float], num_samples: int, wait_seconds: float, learning_rate: float) -> None:
        """Record the optimizer step that `state` has just counted."""
        self._line_samples += num_samples
        self._line_wait += wait_seconds
        for name, value in losses.items():
            self._writer.add_scalar(f"loss/{name}", value, state.step)
        self._writer.add_scalar("learning_rate", learning_rate, state.step)
        now = time.monotonic()
        if now - self._last_line >= self._every or state.step == self._total:
            self._print(state, losses, now)

    def validation(self, state: TrainingState, metric: str) -> None:
        """Record an epoch's validation and send the TensorBoard files to the store."""
        for name, value in state.validation.items():
            self._writer.add_scalar(f"validation/{name}", value, state.step)
        best = " (best)" if state.best_step == state.step else ""
        logger.info("epoch %d/%d | validation %s %.4f%s", state.epoch, self._epochs, metric, state.validation[metric], best)
        self._writer.flush()
        for path in filter(Path.is_file, self._folder.iterdir()):
            self._storage.upload(path, f"{self._target}/{path.name}")

    def close(self) -> None:
        """End the TensorBoard file."""
        self._writer.close()

    def _print(self, state: TrainingState, losses: dict[str, float], now: float) -> None:
        seconds = max(now - self._last_line, 1e-9)
        remaining = (now - self._begin) / max(1, state.step - self._first_step) * (self._total - state.step)
        parts = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        line = "step %d/%d | epoch %d/%d | loss %s | %.0f samples/s | data wait %.1f %% | ETA %d:%02d"
        speed = (self._line_samples / seconds, 100 * self._line_wait / seconds)
        logger.info(line, state.step, self._total, state.epoch + 1, self._epochs, parts, *speed, *divmod(int(remaining), 60))
        self._last_line, self._line_samples, self._line_wait = now, 0, 0.0
