"""The terminal of a verb shows this project's lines; all else that the verb, its libraries and its workers print goes to a log file.

The file replaces the process's stdout and stderr, so that it gets what libraries and child processes print, too. A worker's lines
reach it through Ray; those of this project carry a mark, by which a thread finds and shows them.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

MARK = "[recsys] "
PACKAGES = ("recsys", "jobs", "tune", "serve", "__main__")
FORMAT = "%(asctime)s %(levelname).1s %(message)s"
TIME_FORMAT = "%H:%M:%S"
POLL_SECONDS = 0.1
PROGRESS = ("█", "·")
"""Lines that begin with one of these replace one another on a terminal."""

_SHOWN: "list[_Terminal]" = []
"""The terminal, while the process's own stderr is a log file."""


def stream() -> TextIO:
    """Return the stderr that the program was started with."""
    return _SHOWN[-1].stream if _SHOWN else sys.stderr


def is_quiet() -> bool:
    """Return whether output goes to a log file."""
    return bool(_SHOWN)


@contextlib.contextmanager
def output_to(log: Path | None) -> Iterator[None]:
    """Send stdout and stderr of this process and its children to the file `log` in the block; without one everything to stderr."""
    if log is None:
        _log_to(logging.StreamHandler())
        yield
        return
    before = [os.dup(number) for number in (1, 2)]
    own = _Terminal(os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace"))
    with log.open("a") as target:
        _redirect(target.fileno(), target.fileno())
    _SHOWN.append(own)
    own.setLevel(logging.INFO)
    own.addFilter(_is_own)
    everything = logging.StreamHandler()
    everything.setFormatter(logging.Formatter(f"{FORMAT} (%(name)s)"))
    _log_to(own, everything)
    is_over = threading.Event()
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        follower = threading.Thread(target=_show_marked, args=(file, is_over), name="terminal", daemon=True)
        follower.start()
        try:
            yield
        finally:
            is_over.set()
            follower.join()
            show("")
            logging.getLogger().removeHandler(own)
            _redirect(*before)
            for number in before:
                os.close(number)
            _SHOWN.remove(own)


def mark_lines(level: int = logging.INFO) -> None:
    """Mark this project's log lines from `level` on in a worker of Ray, so that the driver shows them; all go to its log file."""

    def mark(record: logging.LogRecord) -> bool:
        vars(record)["mark"] = MARK if _is_own(record) and record.levelno >= level else ""
        return True

    handler = logging.StreamHandler()
    handler.addFilter(mark)
    handler.setFormatter(logging.Formatter("%(mark)s%(levelname).1s %(message)s"))
    _log_to(handler)


def _log_to(*handlers: logging.Handler) -> None:
    """Log to these handlers only: all of this project, and of libraries from INFO on. Formats those that have no formatter."""
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True, format=FORMAT, datefmt=TIME_FORMAT)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG)


def _is_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in PACKAGES


def _redirect(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)


def _show_marked(file: TextIO, is_over: threading.Event) -> None:
    """Show the marked lines that are added to the log, until it is over and all is read."""
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


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes whole lines; a line of progress on a terminal stays open, and the next line replaces it or goes below."""

    is_open = False

    def write(self, line: str, is_progress: bool = False) -> None:
        """Write a line."""
        with self.lock or contextlib.nullcontext():
            out = self.stream
            is_replaced = is_progress and out.isatty()
            before = ("\r\x1b[2K" if is_replaced else "\n") if self.is_open else ""
            width = shutil.get_terminal_size().columns - 1
            out.write(before + (line[:width] if is_replaced else line + "\n" if line else ""))
            out.flush()
            self.is_open = is_replaced

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record."""
        self.write(self.format(record))


def format_settings(values: Mapping[str, object], digits: int) -> str:
    """Write settings in one line, such as `model.width=64`; floats with `digits` significant digits."""
    return " ".join(f"{key}={value:.{digits}g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())


def show(text: str) -> None:
    """Show a line; nothing but the end of a line of progress for an empty one."""
    terminal = _SHOWN[-1] if _SHOWN else _Terminal(sys.stderr)
    terminal.write(f"{time.strftime(TIME_FORMAT)} {text}" if text else "", text[2:].startswith(PROGRESS))
