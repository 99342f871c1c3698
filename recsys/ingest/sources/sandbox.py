"""The memory-limited child process that opens untrusted files."""

import atexit
import csv
import gc
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
from pydantic_core import to_jsonable_python

from recsys.errors import UserError

BAD_FILE_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError, csv.Error, zlib.error)
"""Errors that decoders and casts raise on bad content."""

_IDLE_SECONDS = 300
_QUIET_ENVIRONMENT = {
    # A memory pool that returns memory, and no arenas or threads that count against the limit before anything is read.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_lock = threading.Lock()
_children: list["_Child"] = []
_announcements: list[Callable[[str], None]] = []


def run_limited(limit_bytes: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a module-level function in a child process that may use `limit_bytes` of memory; return its result through JSON.

    The arguments are pickled. The child is a fresh interpreter with this process's environment. Later calls reuse it, and it ends with
    this process. Calls from several threads run one at a time.

    Raises:
        UserError: the function raised one or ran out of memory, or a file crashed the child; one line with the file.
        RuntimeError: the function or the child failed for another reason.
    """
    reply = None
    with _lock:
        while reply is None:
            if _children and _children[0].environment != os.environ:
                _children.pop().close()
            if not _children:
                _children.append(_Child())
            try:
                reply = _children[0].call(limit_bytes, function, arguments)
            finally:
                if reply is None:
                    _children.pop().close()
    if "failure" in reply:
        raise RuntimeError(f"{function.__name__} failed in its child process:\n{reply['failure']}")
    if "refusal" in reply:
        raise UserError(reply["refusal"])
    return reply["result"]


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn any error of a decoder into one line that names the file; if the child dies in this block, the error names this file."""
    for announce in _announcements:
        announce(uri)
    try:
        yield
    except UserError as error:
        if uri in str(error):
            raise
        raise UserError(f"{uri}: {error}") from error
    except MemoryError as error:
        raise UserError(_too_large(uri, _short(error))) from error
    except BAD_FILE_ERRORS as error:
        raise UserError(f"{uri}: cannot be read ({_short(error)})") from error


class _Child:
    """The parent's side of the child: sends a call, reads the child's messages, and explains its death."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as the process
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from recsys.ingest.sources.sandbox import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env={**self.environment, **_QUIET_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        atexit.register(self.close)

    def call(self, *request: Any) -> dict[str, Any] | None:
        """Return the child's answer, or None if it ended without starting the call: idle, worn, or killed by another process."""
        if self._process.poll() is not None:
            return None
        log_start = os.fstat(self._log.fileno()).st_size
        uri = ""
        with suppress(EOFError, OSError):  # the child has died
            self._connection.send(request)
            while True:
                reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
                if "reading" not in reply:
                    return reply
                uri = reply["reading"]
        code = self._process.wait()
        if code == 0:
            return None
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not uri:
            raise RuntimeError(f"the child process that reads files ended with {reason}: {self._first_output_line(log_start)}")
        raise UserError(_too_large(uri, f"the process that read it ended with {reason}: {self._first_output_line(log_start)}"))

    def close(self) -> None:
        atexit.unregister(self.close)
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _first_output_line(self, log_start: int) -> str:
        """Return the first line of output of the call in which the child died."""
        words = os.pread(self._log.fileno(), 4096, log_start).decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in words if line.strip()), "it wrote nothing, which is typical when memory runs out")


def serve(descriptor: int) -> None:
    """Answer calls until the other end of the connection closes. This is the body of the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _answer_calls(Connection(descriptor))
    # Skip the interpreter's shutdown: a decoder's threads may still read ahead in a refused file.
    os._exit(0)


def _answer_calls(connection: Connection) -> None:
    _announcements.append(lambda uri: connection.send_bytes(json.dumps({"reading": uri}).encode()))
    start_bytes = 0
    while connection.poll(_IDLE_SECONDS):
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        limit_bytes, function, arguments = pickle.loads(request)
        start_bytes = start_bytes or _data_bytes()
        if _is_worn(start_bytes, limit_bytes):  # by an earlier call with a higher limit
            return
        resource.setrlimit(resource.RLIMIT_DATA, (start_bytes + limit_bytes, resource.RLIM_INFINITY))
        # JSON, not a pickle: a file that takes over this process must not run code in the parent.
        connection.send_bytes(_answer(function, arguments))
        if _is_worn(start_bytes, limit_bytes):
            return


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return json.dumps({"result": to_jsonable_python(function(*arguments))}).encode()
    except UserError as error:
        answer = {"refusal": str(error)}
    except MemoryError:
        answer = {"refusal": _too_large("the input", "out of memory")}
    except Exception:
        answer = {"failure": traceback.format_exc()}
    return json.dumps(answer).encode()


def _is_worn(start_bytes: int, limit_bytes: int) -> bool:
    """Return whether so much memory is still allocated that the next file would not get its full limit."""
    most_bytes = start_bytes + limit_bytes // 4
    if _data_bytes() > most_bytes:
        gc.collect()
        pa.default_memory_pool().release_unused()
    return _data_bytes() > most_bytes


def _data_bytes() -> int:
    """Return the memory that RLIMIT_DATA counts: this process's private writable memory."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))


def _end_with_parent(descriptor: int) -> None:
    """Exit when the parent exits, even during a call: only the parent holds the other end of the connection."""
    poll = select.poll()
    poll.register(descriptor, 0)
    poll.poll()
    os._exit(1)


def _too_large(uri: str, reason: str) -> str:
    return f"{uri}: cannot be read within data.max_file_memory_bytes ({reason}); split the file, or set a higher limit if you trust it"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
