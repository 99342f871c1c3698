"""Terminal output of a verb: the terminal shows this project's log lines; all other output goes to a log file.

The file replaces the process's stdout and stderr, so it also receives the output of libraries and child processes. Workers' lines reach
it through Ray; a thread shows those that carry this project's mark.
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
"""Prefixes of progress lines; on a terminal, each progress line replaces the previous one."""

_SHOWN: "list[_Terminal]" = []
"""The terminal while the process's own stderr is a log file; empty otherwise."""


def stream() -> TextIO:
    """Return the stderr that the program was started with."""
    return _SHOWN[-1].stream if _SHOWN else sys.stderr


def is_quiet() -> bool:
    """Return whether output goes to a log file."""
    return bool(_SHOWN)


@contextlib.contextmanager
def output_to(log: Path | None) -> Iterator[None]:
    """Redirect stdout and stderr of this process and its children to the file `log` in the block; without `log`, log to stderr."""
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
    """Mark this project's log lines of at least `level` in a Ray worker, so that the driver shows them; all lines go to the log file."""

    def mark(record: logging.LogRecord) -> bool:
        vars(record)["mark"] = MARK if _is_own(record) and record.levelno >= level else ""
        return True

    handler = logging.StreamHandler()
    handler.addFilter(mark)
    handler.setFormatter(logging.Formatter("%(mark)s%(levelname).1s %(message)s"))
    _log_to(handler)


def _log_to(*handlers: logging.Handler) -> None:
    """Log to these handlers only: all levels of this project, INFO and above of libraries. Handlers without a formatter get one."""
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
    """Show marked lines that are appended to the log, until `is_over` is set and everything is read."""
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
    """Writes whole lines. On a terminal a progress line stays open: the next progress line replaces it, other lines go below it."""

    is_open = False

    def write(self, line: str, is_progress: bool = False) -> None:
        with self.lock or contextlib.nullcontext():
            out = self.stream
            is_replaced = is_progress and out.isatty()
            before = ("\r\x1b[2K" if is_replaced else "\n") if self.is_open else ""
            width = shutil.get_terminal_size().columns - 1
            out.write(before + (line[:width] if is_replaced else line + "\n" if line else ""))
            out.flush()
            self.is_open = is_replaced

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))


def format_settings(values: Mapping[str, object], digits: int) -> str:
    """Format settings as one line, such as `model.width=64`, with floats to `digits` significant digits."""
    return " ".join(f"{key}={value:.{digits}g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())


def show(text: str) -> None:
    """Show a line on the terminal; empty text only ends an open progress line."""
    terminal = _SHOWN[-1] if _SHOWN else _Terminal(sys.stderr)
    terminal.write(f"{time.strftime(TIME_FORMAT)} {text}" if text else "", text[2:].startswith(PROGRESS))
