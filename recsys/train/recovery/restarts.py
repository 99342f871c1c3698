"""Decides after a worker failure whether to restart or to end the run."""

import logging
import time
from contextlib import suppress

from recsys.config import Config
from recsys.errors import StoreError, UserError
from recsys.store import Storage
from recsys.train.checkpoints.lease import Lease
from recsys.train.checkpoints.manifest import published_steps
from recsys.train.failures import Attempt, Failure, delay_seconds, reason_to_stop, steps_to_skip

logger = logging.getLogger(__name__)
_ATTEMPT = "attempt.json"


class Restarts:
    """Decides on starts of one owner's workers. A pickled copy continues in the process that sees the workers fail."""

    def __init__(self, config: Config, storage: Storage, lease: Lease, causes: tuple[Failure, ...] = ()) -> None:
        self._config, self._storage, self._lease, self._causes = config, storage, lease, causes
        self._failures: list[Failure] = []  # since the newest checkpoint
        self._newest: list[int] = []
        self._owned_since = time.time()

    def begin(self) -> None:
        """Write the first attempt, which workers read at their start."""
        self._newest = self._newest_step()
        self._write()

    def after(self, failure: Failure) -> bool:
        """Wait for the backoff and write the next attempt, or give up the run; return whether workers should restart."""
        reason = self._note(failure)
        while reason is None:
            delay = delay_seconds(self._failures)
            logger.warning("%s; restarting in %.0f s from the newest checkpoint", self._failures[-1], delay)
            time.sleep(delay)
            try:
                self._refuse_if_over()
                self._write()
                return True
            except UserError as error:
                kind = "store" if isinstance(error, StoreError) else "mistake"
                reason = self._note(Failure(kind=kind, message=str(error)))
        self._write(given_up=reason)
        return False

    def read(self) -> Attempt:
        """Return the last decision: the current attempt, or the end of the run."""
        return Attempt.model_validate_json(self._lease.read(_ATTEMPT))

    def _note(self, failure: Failure) -> str | None:
        """Record a failure; return why the run should not restart, or None."""
        training = self._config.training
        with suppress(StoreError):
            if (hung := self._lease.take_hangs()) and failure.kind in ("worker_lost", "collective"):
                ranks = f"ranks {', '.join(map(str, hung))} finished no step within training.hang_seconds = {training.hang_seconds}"
                failure = Failure(kind="hang", message=f"{ranks}; this includes ranks that waited for another one")
            if (found := self._newest_step()) != self._newest:
                self._newest, self._causes, self._failures = found, (), []
        self._failures.append(failure)
        return reason_to_stop(self._failures, training.max_failures, training.on_non_finite)

    def _refuse_if_over(self) -> None:
        self._lease.check()
        if self._lease.is_asked_to_stop():
            raise UserError(f"run {self._config.run.name} was asked to stop; the same command continues from its newest checkpoint")

    def _write(self, given_up: str | None = None) -> None:
        attempt = Attempt(
            token=self._lease.token,
            causes=(*self._causes, *self._failures),
            skip=steps_to_skip(self._failures, self._config.training.on_non_finite),
            owned_since=self._owned_since,
            lost_at=self._lease.lost_at,
            given_up=given_up,
        )
        self._lease.write(_ATTEMPT, attempt.model_dump_json().encode())

    def _newest_step(self) -> list[int]:
        return published_steps(self._storage, self._config.run.name)[-1:]
