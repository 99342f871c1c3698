"""Train one model from a config and return its best checkpoint; the same command resumes it."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Train `run.name` on `data.dataset`."""
    from recsys.launch.driver import check_training, launch  # imported here so that config errors do not wait for torch
    from recsys.objectives.next_item import NextItem

    check_training(config)
    return launch(config, NextItem)


if __name__ == "__main__":
    run_verb("jobs.train", run, __doc__)
