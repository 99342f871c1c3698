"""Search hyperparameters: Optuna proposes, ASHA stops the weak early, and every trial is a whole distributed training run."""

from typing import Any

from recsys.command import run_verb
from recsys.config import Config


def run(config: Config) -> dict[str, Any]:
    """Search around the config on `data.dataset`."""
    from recsys.train.preflight import check_training  # after the config is checked: a mistake shall not wait for torch to load

    check_training(config, *config.search.text_mode)
    from tune.trials import search  # a mistake in data or model shall not wait for Ray to load

    return search(config)


if __name__ == "__main__":
    run_verb("tune.search", run, __doc__)
