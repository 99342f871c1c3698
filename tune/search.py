"""Search hyperparameters: Optuna proposes, ASHA stops the weak early, and every trial is a whole distributed training run."""

from typing import Any

from recsys.command import run_verb
from recsys.config import Config


def run(config: Config) -> dict[str, Any]:
    """Search around the config on `data.dataset`."""
    from tune.trials import search  # after the config is checked: a mistake shall not wait for Ray and torch to load

    return search(config)


if __name__ == "__main__":
    run_verb(run, __doc__)
