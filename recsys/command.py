"""What every verb shares: `--config` and `--set`, logs on stderr, one JSON object as the last line of stdout."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from recsys.config import Config, load_config
from recsys.errors import UserError


def run_verb(verb: Callable[[Config], dict[str, Any]], description: str) -> None:
    """Parse the command line, run `verb` and print its result; exit with 2 on a user's mistake.

    While the verb runs, everything that it or its workers print goes to stderr, so that stdout ends with the JSON alone.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE.toml", help="the config file; defaults apply to what it leaves out")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value", help="override one key (repeatable)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    result_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result = verb(load_config(arguments.config, arguments.overrides))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result), file=result_stream, flush=True)
