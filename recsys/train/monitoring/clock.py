"""Where a run's time goes, and what each return to a checkpoint cost."""

import time

from pydantic import BaseModel, ConfigDict, Field

from recsys.train.checkpoints.manifest import CheckpointManifest
from recsys.train.failures import Failure
from recsys.train.state import Incident, TrainingState


class Attempt(BaseModel):
    """One start of a group of workers: the owner's number, since when it owns the run, and why and when they were started.

    `lost_at` is when the owner before, if it died, gave its last sign of life.

    Of the steps in `skip` no update is to be made. Where `given_up` says why, there is no start, and the last cause is what ended the run.
    Times are seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: int = 0
    causes: tuple[Failure, ...] = ()
    skip: tuple[int, ...] = ()
    owned_since: float = Field(default_factory=time.time)
    lost_at: float | None = None
    started_at: float = Field(default_factory=time.time)
    given_up: str | None = None


class Clock:
    """Measures one rank's attempt, and writes into the state what is to be known of it later."""

    def __init__(self, attempt: Attempt, world_size: int) -> None:
        self.attempt, self._world_size = attempt, world_size
        self._constructed_at = self._loaded_at = time.time()
        self._resumed: CheckpointManifest | None = None
        self._since, self._wall_seconds, self._has_stepped = attempt.owned_since, 0.0, False
        self._lost_seconds = 0.0  # from the checkpoint to the end of the owner before

    def loaded(self, resumed: CheckpointManifest | None) -> None:
        """Note that the model is built and its state loaded, from a checkpoint or from nothing."""
        self._loaded_at, self._resumed = time.time(), resumed
        if resumed is not None:
            self._wall_seconds = resumed.state.wall_seconds
            if self._is_same_owner:
                self._since = resumed.state.saved_at
            elif self.attempt.lost_at is not None:
                self._lost_seconds = max(0.0, self.attempt.lost_at - resumed.state.saved_at)
                self._wall_seconds += self._lost_seconds

    def stamp(self, state: TrainingState) -> None:
        """Write the time into a state that is about to be saved."""
        state.saved_at = time.time()
        state.wall_seconds = self._wall_seconds + state.saved_at - self._since

    def stepped(self, state: TrainingState, wait_seconds: float) -> None:
        """Note the end of a step; after the first one it is known what the return to the checkpoint cost."""
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

    @property
    def _is_same_owner(self) -> bool:
        """Whether the process that made this attempt was there when the checkpoint was saved, and all the time since."""
        return self._resumed is not None and self._resumed.token == self.attempt.token > 0
