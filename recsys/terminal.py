"""What a person sees of a verb: this project's lines. All else that the verb, its libraries and its workers print goes to a log file.

The file takes the place of the process's stdout and stderr, so that nothing that a library or a child prints can escape it. A worker's
lines reach it through Ray; those of this project carry a mark, by which a thread finds them and shows them.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

MARK = "[recsys] "
PACKAGES = ("recsys", "jobs", "tune", "serve", "__main__")
FORMAT = "%(asctime)s %(levelname).1s %(message)s"
TIME_FORMAT = "%H:%M:%S"
POLL_SECONDS = 0.1
PROGRESS = ("█", "·")
"""Lines that begin with one of these replace one another on a terminal."""

_SHOWN: list[TextIO] = []
"""The terminal, while the process's own stderr is a log file."""


def stream() -> TextIO:
    """Return where a person reads: the stderr that the program was started with."""
    return _SHOWN[-1] if _SHOWN else sys.stderr


@contextlib.contextmanager
def output_to(log: Path | None) -> Iterator[None]:
    """Send stdout and stderr of this process and its children to the file `log` in the block; without one everything to stderr."""
    if log is None:
        _redirect(2, 2)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=FORMAT, datefmt=TIME_FORMAT, force=True)
        yield
        return
    before = [os.dup(number) for number in (1, 2)]
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    shown = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    _SHOWN.append(shown)
    _redirect(target, target)
    os.close(target)
    own = logging.StreamHandler(shown)
    own.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
    own.setLevel(logging.INFO)
    own.addFilter(_is_own)
    everything = logging.StreamHandler(sys.stderr)
    everything.setFormatter(logging.Formatter(f"{FORMAT} (%(name)s)"))
    logging.basicConfig(level=logging.INFO, handlers=[own, everything], force=True)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG)
    is_over = threading.Event()
    follower = threading.Thread(target=_show_marked, args=(log, is_over), name="terminal", daemon=True)
    follower.start()
    try:
        yield
    finally:
        is_over.set()
        follower.join()
        logging.getLogger().removeHandler(own)
        _redirect(*before)
        for number in before:
            os.close(number)
        _SHOWN.remove(shown)


def mark_lines() -> None:
    """Mark this project's log lines in a worker of Ray, so that the driver shows them; may be called again."""
    handler = logging.StreamHandler()
    handler.setFormatter(_MarkingFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _MarkingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the message, marked where it is this project's."""
        return f"{MARK if _is_own(record) else ''}{record.levelname[:1]} {super().format(record)}"


def _is_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in PACKAGES


def _redirect(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


def _show_marked(log: Path, is_over: threading.Event) -> None:
    """Show the marked lines that are added to the log, until it is over and all is read."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        rest = ""
        while True:
            was_over = is_over.is_set()
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                if MARK in line:
                    show(line.partition(MARK)[2])
            if was_over:
                return
            is_over.wait(POLL_SECONDS)


def show(text: str) -> None:
    """Show a line; a line of progress replaces the one before on a terminal."""
    out = stream()
    line = f"{time.strftime(TIME_FORMAT)} {text}"
    if out.isatty() and text[2:].startswith(PROGRESS):
        out.write(f"\r\x1b[2K{line}")
    else:
        out.write(f"{line}\n")
    out.flush()
