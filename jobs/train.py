"""Train one model from a config and return its best checkpoint; the same command resumes it."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Train `run.name` on `data.dataset`."""
    from recsys.launch.checks import check_training  # imported here so that config errors wait for nothing

    check_training(config)
    from recsys.launch.driver import launch  # imports torch
    from recsys.objectives.next_item import NextItem

    return launch(config, NextItem)


if __name__ == "__main__":
    run_verb("jobs.train", run, __doc__)
