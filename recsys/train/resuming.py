"""What decides how a run goes on: which settings may differ from its checkpoint's, which checkpoints are kept. No files, no processes."""

import json
from collections.abc import Iterable
from typing import Any

MAY_CHANGE = ("storage.", "run.", "checkpoint.", "search.", "export.", "service.")
MAY_CHANGE_KEYS = (
    "training.num_workers",
    "training.micro_batch_size",
    "data.dataset",
    "data.source",
    "data.base",
    "data.folder",
    "data.events",
    "data.items",
    "data.users",
    "evaluation.checkpoint",
    "evaluation.compare",
    "evaluation.curve",
    "evaluation.baselines",
    "evaluation.baseline_epochs",
    "evaluation.fairness_attributes",
    "evaluation.diversity",
    "evaluation.diversity_method",
    "evaluation.split",
    "evaluation.cutoffs",
    "evaluation.batch_size",
    "training.epochs",
    "training.max_steps",
    "training.early_stopping_patience",
    "training.max_failures",
    "training.hang_seconds",
    "training.on_non_finite",
    "training.recompute_activations",
    "training.log_every_seconds",
    "training.profile_steps",
    "training.cpus_per_worker",
    "optimizer.final_fraction",
)


def superfluous_steps(steps: Iterable[int], best_step: int | None, keep_last: int) -> list[int]:
    """Choose the checkpoints to delete: all but the last `keep_last` and the best."""
    return [step for step in sorted(steps)[:-keep_last] if step != best_step]


def config_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the keys whose values forbid a resume, as `key: saved -> current`."""
    before, after = dict(leaves(saved)), dict(leaves(current))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE) and key not in MAY_CHANGE_KEYS
    ]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the values of nested sections as `section.key` and value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
