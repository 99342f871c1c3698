"""Train one model: a config in, the best checkpoint out. The same command resumes it."""

from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb


def run(config: Config) -> dict[str, Any]:
    """Train `run.name` on `data.dataset`."""
    from recsys.launch.preflight import check_training  # after the config is checked: a mistake shall not wait for torch to load

    check_training(config)
    from recsys.launch.run import launch  # a mistake in data or model shall not wait for Ray to load
    from recsys.objectives.next_item import NextItem

    return launch(config, NextItem)


if __name__ == "__main__":
    run_verb("jobs.train", run, __doc__)
