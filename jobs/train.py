"""Train one model: a config in, the best checkpoint out. Submitting the same command again goes on where it stopped."""

from typing import Any

from recsys.command import run_verb
from recsys.config import Config


def run(config: Config) -> dict[str, Any]:
    """Train `run.name` on `data.dataset`."""
    from recsys.launch import launch  # after the config is checked: a mistake shall not wait for Ray and torch to load

    return launch(config)


if __name__ == "__main__":
    run_verb(run, __doc__)
