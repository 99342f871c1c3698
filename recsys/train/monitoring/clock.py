"""Measures where a run's time goes, and the cost of each return to a checkpoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from recsys.train.checkpoints.manifest import CheckpointManifest
from recsys.train.failures import Attempt, Failure
from recsys.train.state import Incident, TrainingState


class Clock:
    """Measures one rank's attempt and records its times in the training state."""

    def __init__(self, attempt: Attempt, world_size: int) -> None:
        self.attempt, self._world_size = attempt, world_size
        self._constructed_at = self._loaded_at = time.time()
        self._resumed: CheckpointManifest | None = None
        self._is_same_owner = False  # the checkpoint was saved under this attempt's owner
        self._since, self._wall_seconds, self._has_stepped = attempt.owned_since, 0.0, False
        self._lost_seconds = 0.0  # from the checkpoint to the previous owner's last heartbeat

    def loaded(self, resumed: CheckpointManifest | None) -> None:
        """Record that the model is built and, if there is a checkpoint, its state is loaded."""
        self._loaded_at, self._resumed = time.time(), resumed
        if resumed is None:
            return
        self._is_same_owner = resumed.token == self.attempt.token > 0
        if self._is_same_owner:
            self._since = resumed.state.saved_at
        elif self.attempt.lost_at is not None:
            self._lost_seconds = max(0.0, self.attempt.lost_at - resumed.state.saved_at)
        self._wall_seconds = resumed.state.wall_seconds + self._lost_seconds

    @contextmanager
    def stall(self, state: TrainingState) -> Iterator[None]:
        """Count the block as time in which a checkpoint stalls training."""
        begin = time.monotonic()
        yield
        state.checkpoint_stall_seconds += time.monotonic() - begin

    def stamped(self, state: TrainingState) -> TrainingState:
        """Set the times of a state that is about to be saved, and return it."""
        state.saved_at = time.time()
        state.wall_seconds = self._wall_seconds + state.saved_at - self._since
        return state

    def stepped(self, state: TrainingState, wait_seconds: float) -> None:
        """Record the end of a step; after the first one, add an incident with the cost of the restart, if it is one."""
        if self._has_stepped:
            return
        self._has_stepped = True
        causes, started_at = self.attempt.causes, self.attempt.started_at
        if self._resumed is not None and self._is_same_owner and self._resumed.state.saved_at > started_at:
            message = f"{self._resumed.world_size} workers became {self._world_size}"
            causes, started_at = (Failure(kind="resized", message=message),), self._resumed.state.saved_at
        elif not causes and not self._is_same_owner:
            return
        incident = Incident(
            causes=causes,
            step=state.step,
            seconds=self._lost_seconds + time.time() - self._since,
            start_seconds=self._constructed_at - started_at,
            load_seconds=self._loaded_at - self._constructed_at,
            seek_seconds=wait_seconds,
        )
        state.incidents.append(incident)
