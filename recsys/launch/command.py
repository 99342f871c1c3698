"""The command line of all verbs: `--config`, `--set`, `--verbose`, `--help`; one JSON object as the last line of stdout."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from recsys import terminal
from recsys.config import Config, load_config
from recsys.config.verb_settings import unread
from recsys.errors import UserError
from recsys.store import private_folder
from recsys.store.errors import explained

logger = logging.getLogger(__name__)


def run_verb(name: str, verb: Callable[[Config], dict[str, Any]], description: str | None) -> None:
    """Parse the command line, run the verb `name` and print its result.

    Exits with 2 on a user-fixable error and with 1 on any other failure, with a one-line message on stderr.
    """
    arguments = _parser(name, description).parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        log = None if arguments.verbose else _log_file(config, name)
    except UserError as error:
        _fail(error)
    begin = time.monotonic()
    with _stdout_for_the_result() as stdout, _noticed_end(log), terminal.output_to(log):
        try:
            if missed := unread(name, config):
                logger.warning("%s does not read %s", name, ", ".join(missed))
            result = verb(config)
        except UserError as error:
            _fail(error)
        except Exception as error:
            traceback.print_exc()
            _fail(f"{type(error).__name__}: {error}" + (f"; the traceback is in {log}" if log else ""), status=1)
        print(json.dumps(result), file=stdout)
    terminal.show(f"I {name} took {time.monotonic() - begin:.1f} s" + (f"; log: {log}" if log else ""))


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.toml", help="config file; what it leaves out has a default")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="section.key=value", help="override a key; repeatable"
    )
    parser.add_argument("--verbose", action="store_true", help="show what goes to the log file otherwise")
    if {"-h", "--help"} & set(sys.argv):
        from recsys.config.help_text import help_text

        parser.epilog = f"settings:\n\n{help_text(name)}"
    return parser


def _stdout_for_the_result() -> TextIO:
    """Return stdout for the result, and redirect all other output to stdout to stderr until the process ends."""
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


@contextlib.contextmanager
def _noticed_end(log: Path | None) -> Iterator[None]:
    """Name the log file on the terminal if this process ends within the block without a last line, as native code and kills end it.

    A child process waits for the end of a pipe: nothing runs any more in a process that ends in this way.
    """
    if log is None:
        yield
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are also sent to the whole process group
                signal.signal(number, signal.SIG_IGN)
            os.close(writing)
            if not os.read(reading, 1):
                os.write(2, f"error: the process ended unexpectedly; its last output is in {log}\n".encode())
        finally:
            os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a child that is gone is no reason to fail
            os.write(writing, b".")
        os.close(writing)
        with contextlib.suppress(OSError):
            os.waitpid(child, 0)


def _log_file(config: Config, name: str) -> Path:
    path = private_folder(Path(config.run.scratch) / "logs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with explained("make the log file", str(path)):
        path.touch(mode=0o600)
    return path


def _fail(error: object, status: int = 2) -> NoReturn:
    terminal.show("")  # moves below the progress line
    print(f"error: {' '.join(str(error).split())}", file=terminal.stream())
    sys.exit(status)
