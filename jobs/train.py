"""Train one model: a config in, the best checkpoint out. Submitting the same command again goes on where it stopped."""

from typing import Any

from recsys.command import run_verb
from recsys.config import Config
from recsys.launch import launch
from recsys.runtime import connect


def run(config: Config) -> dict[str, Any]:
    """Train `run.name` on `data.dataset`."""
    with connect(config):
        return launch(config)


if __name__ == "__main__":
    run_verb(run, __doc__)
