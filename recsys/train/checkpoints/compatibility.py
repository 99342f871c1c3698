"""Pure decisions about resuming: which settings may differ from the checkpoint's, and which checkpoints are kept."""

import json
from collections.abc import Iterable
from typing import Any

from recsys.config.base import Fact, leaves
from recsys.config.tree import with_present_keys
from recsys.config.verb_settings import facts_of


def superfluous_steps(steps: Iterable[int], best_step: int | None, keep_last: int) -> list[int]:
    """Choose the checkpoints to delete: all but the last `keep_last` and the best."""
    return [step for step in sorted(steps)[:-keep_last] if step != best_step]


def config_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the keys whose values forbid a resume, as `key: saved -> current`."""
    before, after = dict(leaves(with_present_keys(saved))), dict(leaves(current))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and Fact.MAY_CHANGE not in facts_of(key)
    ]
