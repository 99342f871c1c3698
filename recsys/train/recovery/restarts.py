"""Decides what follows when workers fail: a restart or the end of the run."""

import logging
import time
from contextlib import suppress

from recsys.config import Config
from recsys.errors import StoreError, UserError
from recsys.store import Storage
from recsys.train.checkpoints.lease import Ownership
from recsys.train.checkpoints.manifest import published_steps
from recsys.train.failures import Failure, delay_seconds, reason_to_stop, steps_to_skip
from recsys.train.monitoring.clock import Attempt

logger = logging.getLogger(__name__)


class Restarts:
    """The starts of one owner's workers; a pickled copy of it works on in whatever process sees them fail."""

    def __init__(self, config: Config, storage: Storage, ownership: Ownership, causes: tuple[Failure, ...] = ()) -> None:
        self._config, self._storage, self._ownership, self._causes = config, storage, ownership, causes
        self._failures: list[Failure] = []  # since the newest checkpoint
        self._newest: list[int] = []
        self._owned_since, self._lost_at = time.time(), ownership.lost_at

    def begin(self) -> None:
        """Let workers be started for the first time."""
        self._newest = self._newest_step()
        self._write(self._next())

    def after(self, failure: Failure) -> bool:
        """Wait for as long as is fit and let workers be started again, or give the run up; tell which."""
        reason = self._note(failure)
        while reason is None:
            delay = delay_seconds(self._failures)
            logger.warning("%s; starting again in %.0f s from the newest checkpoint", self._failures[-1], delay)
            time.sleep(delay)
            try:
                self._refuse_if_over()
                self._write(self._next())
                return True
            except UserError as error:
                kind = "store" if isinstance(error, StoreError) else "mistake"
                reason = self._note(Failure(kind=kind, message=str(error)))
        self._write(self._next(given_up=reason))
        return False

    def _note(self, failure: Failure) -> str | None:
        """Record a failure; return why the run should not restart, if it should not."""
        training = self._config.training
        with suppress(StoreError):
            if (hung := self._ownership.take_hangs()) and failure.kind in ("worker_lost", "collective"):
                ranks = f"ranks {', '.join(map(str, hung))} ended no step within training.hang_seconds = {training.hang_seconds}"
                failure = Failure(kind="hang", message=f"{ranks}; those that waited for another count too")
            if (found := self._newest_step()) != self._newest:
                self._newest, self._causes, self._failures = found, (), []
        self._failures.append(failure)
        return reason_to_stop(self._failures, training.max_failures, training.on_non_finite)

    def _refuse_if_over(self) -> None:
        self._ownership.check()
        if self._ownership.is_asked_to_stop():
            raise UserError(f"run {self._config.run.name} was asked to stop; the same command goes on from its newest checkpoint")

    def _next(self, given_up: str | None = None) -> Attempt:
        return Attempt(
            token=self._ownership.token,
            causes=(*self._causes, *self._failures),
            skip=steps_to_skip(self._failures, self._config.training.on_non_finite),
            owned_since=self._owned_since,
            lost_at=self._lost_at,
            given_up=given_up,
        )

    def _newest_step(self) -> list[int]:
        return published_steps(self._storage, self._config.run.name)[-1:]

    def _write(self, attempt: Attempt) -> None:
        self._ownership.write_attempt(attempt.model_dump_json().encode())

    def read(self) -> Attempt:
        """Return what was last decided: the start that is under way, or the end."""
        return Attempt.model_validate_json(self._ownership.read_attempt())
