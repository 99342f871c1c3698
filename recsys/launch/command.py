"""What every verb shares: `--config` and `--set`, logs on stderr, one JSON object as the last line of stdout."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from recsys.config import Config, load_config
from recsys.config.use import unread
from recsys.errors import UserError

logger = logging.getLogger(__name__)


def run_verb(name: str, verb: Callable[[Config], dict[str, Any]], description: str | None) -> None:
    """Parse the command line, run the verb `name` and print its result; exit with 2 on a user's mistake.

    While the verb runs, everything that it or its workers print goes to stderr, so that stdout ends with the JSON alone.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="config file; what it leaves out has a default")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="section.key=value", help="override a key; repeatable"
    )
    if {"-h", "--help"} & set(sys.argv):
        from recsys.config.settings import help_text

        parser.epilog = f"settings:\n\n{help_text(name)}"
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    result_descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if missed := unread(name, config):
            logger.warning("%s does not read %s", name, ", ".join(missed))
        result = verb(config)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    with os.fdopen(result_descriptor, "w", encoding="utf-8") as stream:
        print(json.dumps(result), file=stream)
