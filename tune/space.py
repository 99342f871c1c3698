"""The search space: the config's `search` section as distributions over config keys."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from recsys.config import Config
from recsys.config.evaluation import SearchConfig
from recsys.config.verb_settings import TRIALS

if TYPE_CHECKING:
    from ray.tune.search.sample import Domain


def search_space(search: SearchConfig) -> dict[str, "Domain"]:
    """Return a distribution for each config key that the search varies; a list with one value fixes its key."""
    from ray.tune import choice, loguniform  # Ray must not be imported before `recsys.launch.head.connect`

    return {
        "optimizer.learning_rate": loguniform(*search.learning_rate),
        "model.width": choice(search.width),
        "model.dropout": choice(search.dropout),
        "model.loss.kind": choice(search.loss),
        "model.text.mode": choice(search.text_mode),
    }


def trial_config(config: Config, identity: str, sample: dict[str, Any]) -> Config:
    """Return a trial's config: `config` with the sample's values, and a run name derived from the search and the sample.

    A search that is submitted again therefore finds its trials' runs, finished or not.
    """
    key = hashlib.sha256(json.dumps([identity, sample], sort_keys=True).encode()).hexdigest()[:8]
    return config.with_values({**sample, "run.name": f"{config.run.name}{TRIALS}{key}"})
