"""The lease on a run: one live owner at a time. Each owner has a higher token than the one before, and records it in its checkpoints.

Layout: `runs/{run}/owners/{token}/{owner.json, alive, attempt.json, stop, hang-{rank}, released}`. `owner.json` is a create-once write,
so one of several concurrent owners wins. `alive` is a heartbeat, rewritten every `run.lease_seconds` / 4. Another process may take over
if the heartbeat does not change for `run.lease_seconds` or, on the same machine, if the process is gone.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from recsys.errors import UserError
from recsys.store import Storage, join
from recsys.train.proc_stat import stat_of

logger = logging.getLogger(__name__)


class SupersededError(UserError):
    """Another process has taken over the run."""


class Owner(BaseModel, frozen=True, extra="forbid"):
    """The process that trains a run; `machine` identifies the machine, or the container if it has its own process ids."""

    host: str
    machine: str
    process_id: int
    process_started: str
    since: str

    @classmethod
    def this_process(cls) -> "Owner":
        """Return the calling process as an owner."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            process_id=os.getpid(),
            process_started=_start_of(os.getpid()) or "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_here(self) -> bool:
        """Return whether the owner's process would be visible to this process."""
        return bool(self.machine) and self.machine == _machine()

    def is_gone(self) -> bool:
        """Return whether the process is known to have ended."""
        return self.is_here() and _start_of(self.process_id) != self.process_started

    def __str__(self) -> str:
        return f"process {self.process_id} on {self.host} since {self.since}"


class Lease:
    """The lease on a run, and the files of the owner with `token`. 0 means no owner: it may publish only if the run never had one."""

    def __init__(self, storage: Storage, run: str, token: int = 0) -> None:
        self._storage, self._run, self.token = storage, run, token
        self.lost: Owner | None = None
        self.lost_at: float | None = None
        self._uri = storage.uri("runs", run, "owners")

    def check(self) -> None:
        """Raise SupersededError if another owner has taken over the run."""
        if (newest := self._newest()) != self.token:
            raise SupersededError(f"run.name = {self._run}: {self._owner(newest)} has taken it over; this process publishes nothing more")

    def write(self, name: str, content: bytes = b"") -> None:
        """Write one of the owner's files."""
        self._storage.write_bytes(self._file(self.token, name), content)

    def read(self, name: str) -> bytes:
        """Read one of the owner's files."""
        return self._storage.read_bytes(self._file(self.token, name))

    def ask_to_stop(self) -> None:
        """Request that the run publishes a checkpoint after the current step and ends."""
        self.write("stop")

    def is_asked_to_stop(self) -> bool:
        """Return whether the owner was asked to stop."""
        return self._storage.exists(self._file(self.token, "stop"))

    def note_hang(self, rank: int) -> None:
        """Record that a rank made no progress and was killed."""
        self.write(f"hang-{rank}")

    def take_hangs(self) -> list[int]:
        """Return the ranks recorded by `note_hang` since the last call, and delete the records."""
        hang = self._file(self.token, "hang-")
        found = [stored.uri for stored in self._storage.list(hang.rpartition("/")[0]) if stored.uri.startswith(hang)]
        for uri in found:
            self._storage.delete(uri)
        return sorted(int(uri.removeprefix(hang)) for uri in found)

    @contextmanager
    def held(self, lease_seconds: float) -> Iterator[int]:
        """Hold the lease for the block and yield the new token; raise a UserError that names the live owner, if the run has one.

        Sets `lost` to the previous owner if it died, and `lost_at` to its last heartbeat, in seconds since 1970.
        """
        self._take(lease_seconds)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(ended, lease_seconds / 4), name="owner", daemon=True)
        beating.start()
        try:
            yield self.token
        finally:
            ended.set()
            beating.join()
            with suppress(UserError):  # without it, the next owner waits for a heartbeat
                self.write("released")

    def _take(self, lease_seconds: float) -> None:
        while True:
            last = self._newest()
            if last and self._is_alive(last, lease_seconds):
                raise UserError(
                    f"run.name = {self._run}: is trained by {self._owner(last)}; wait for it, stop it, or choose another run.name"
                )
            self.lost = self._owner(last) if last and not self._is_released(last) else None
            self.lost_at = float(self._last_beat(last) or 0) or None if self.lost else None
            self.token = last + 1
            if self._storage.create(self._file(self.token, "owner.json"), Owner.this_process().model_dump_json().encode()):
                return

    def _is_alive(self, token: int, lease_seconds: float) -> bool:
        if self._is_released(token):
            return False
        owner = self._owner(token)
        if owner.is_here():
            return not owner.is_gone()
        logger.info("run %s was last trained by %s; waiting up to %.0f s for its heartbeat", self._run, owner, lease_seconds)
        before, deadline = self._last_beat(token), time.monotonic() + lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, lease_seconds / 10))
            if self._last_beat(token) != before:
                return True
        return False

    def _beat(self, ended: threading.Event, seconds: float) -> None:
        while True:
            try:
                self.write("alive", str(time.time()).encode())
            except Exception as error:  # the next heartbeat may succeed
                logger.warning("run %s: the heartbeat could not be written: %s", self._run, error)
            if ended.wait(seconds):
                return

    def _newest(self) -> int:
        """Return the last owner's token, 0 if there was none."""
        names = [found.uri.split("/")[-2] for found in self._storage.list(self._uri) if found.uri.endswith("/owner.json")]
        return max(map(int, names), default=0)

    def _owner(self, token: int) -> Owner:
        return Owner.model_validate_json(self._storage.read_bytes(self._file(token, "owner.json")))

    def _is_released(self, token: int) -> bool:
        return self._storage.exists(self._file(token, "released"))

    def _last_beat(self, token: int) -> bytes:
        uri = self._file(token, "alive")
        return self._storage.read_bytes(uri) if self._storage.exists(uri) else b""

    def _file(self, token: int, name: str) -> str:
        return join(self._uri, f"{token:08d}", name)


def _machine() -> str:
    """Return an id of this machine or container; empty if unknown."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()}-{namespace.stat().st_ino}" if boot.exists() and namespace.exists() else ""


def _start_of(process_id: int) -> str | None:
    """Return the start time of a local process in kernel ticks; None if it does not exist or is a zombie."""
    fields = stat_of(process_id)
    return None if fields[:1] in ([], ["Z"]) else fields[19]
