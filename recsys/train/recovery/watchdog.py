"""Kills a rank that hangs in a step, from a separate process that a stopped or deadlocked rank cannot delay.

`python -m recsys.train.recovery.watchdog` is this process. It imports almost nothing until it has to report a hang.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from recsys.train.proc_stat import stat_of

if TYPE_CHECKING:
    from recsys.config.storage import StorageConfig

BEAT, REST = b"b", b"r"
MAX_RECORD_SECONDS = 15.0
MAX_POLL_SECONDS = 1.0


class Watchdog:
    """Watches the calling process in the block: after each `beat`, the next `beat` or `rest` must come within the limit.

    At rest, which is the initial state, the process may take any time, but a signal must not stop it for longer than the limit. Ranks
    that deadlock at rest end by the timeout of their collective.
    """

    def __init__(self, limit_seconds: float, storage: "StorageConfig", run: str, token: int, rank: int) -> None:
        arguments = [str(os.getpid()), str(limit_seconds), storage.model_dump_json(), run, str(token), str(rank)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen([sys.executable, "-m", __name__, *arguments], stdin=subprocess.PIPE, env=environment)

    def beat(self) -> None:
        """Report that a step has ended and another begins."""
        self._say(BEAT)

    def rest(self) -> None:
        """Report the start of work that may take any time."""
        self._say(REST)

    def _say(self, word: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the watchdog is gone; training continues
            os.write(self._process.stdin.fileno(), word)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def is_silent(process_id: int, limit_seconds: float) -> bool:
    """Read the watched process's reports on stdin; return True if it is silent for too long, False if it ends before."""
    word, silent_since = REST, time.monotonic()
    while time.monotonic() - silent_since < limit_seconds:
        ready, _, _ = select.select([sys.stdin], [], [], min(MAX_POLL_SECONDS, limit_seconds / 4))
        if ready:
            said = os.read(sys.stdin.fileno(), 4096)
            if not said:
                return False
            word = said[-1:]
        if ready or (word == REST and stat_of(process_id)[:1] not in (["T"], ["t"])):  # at rest, and not stopped by a signal
            silent_since = time.monotonic()
    return os.getppid() == process_id


def main() -> None:
    """Watch a process; if it hangs, record this in the store for the run's owner and kill it."""
    process_id, limit_seconds, storage, run, token, rank = sys.argv[1:]
    if is_silent(int(process_id), float(limit_seconds)):
        print(f"rank {rank} has finished no step for {limit_seconds} s; killing it", file=sys.stderr, flush=True)
        word = threading.Thread(target=record_hang, args=(int(process_id), storage, run, int(token), int(rank)), daemon=True)
        word.start()
        word.join(MAX_RECORD_SECONDS)
        if os.getppid() == int(process_id):
            os.kill(int(process_id), signal.SIGKILL)


def record_hang(process_id: int, storage: str, run: str, token: int, rank: int) -> None:
    """Record in the store that this rank hangs."""
    from recsys.config.storage import StorageConfig
    from recsys.store import Storage
    from recsys.train.checkpoints.lease import Lease

    lease = Lease(Storage.from_config(StorageConfig.model_validate_json(storage)), run, token)
    if os.getppid() == process_id:  # otherwise it has ended meanwhile
        lease.note_hang(rank)


if __name__ == "__main__":
    main()
