"""Two checkpoints on the same users: how far they differ, and whether that is more than chance."""

from typing import Any

import numpy as np

from recsys.evaluation.metrics import Values, ranking_metrics
from recsys.evaluation.ranking import Ranked
from recsys.evaluation.significance import bootstrap_intervals, sign_flip_p
from recsys.evaluation.slices import Slice


def compare(ranked: Ranked, other: Ranked, slices: dict[str, Slice], cutoffs: tuple[int, ...], metric: str) -> dict[str, Any]:
    """Test the ranking metrics of two rankings of the same users in pairs; of the slices, the main metric alone.

    Each difference is this one minus the other, with a 95 % interval of paired resamples and a two-sided p of sign flips.
    """
    mine, theirs = (ranking_metrics(each.ranks, cutoffs) for each in (ranked, other))
    cutoff = int(metric.partition("@")[2])
    in_slices = {name: (each.metrics(ranked, cutoff)[metric], each.metrics(other, cutoff)[metric]) for name, each in slices.items()}
    return {
        "metrics": {
            name: {"value": float(mine[name].mean()), "other": float(theirs[name].mean()), **differences}
            for name, differences in _differ({name: mine[name] - theirs[name] for name in mine}).items()
        },
        "slices": {name: _differ({metric: own - others}) for name, (own, others) in in_slices.items()},
    }


def sentence(compared: dict[str, Any], metric: str) -> str:
    """Say what was found of one metric in a line."""
    found = compared["metrics"][metric]
    low, high = found["interval_95"]
    return (
        f"{metric} {found['value']:.4f} against {found['other']:.4f} of {compared['checkpoint']}: "
        f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p = {found['p']:.4f}"
    )


def _differ(differences: dict[str, Values]) -> dict[str, dict[str, Any]]:
    ps = sign_flip_p(np.stack(list(differences.values()), axis=1))
    intervals = bootstrap_intervals(differences)
    return {
        name: {"difference": float(values.mean()), "interval_95": intervals[name], "p": float(p)}
        for (name, values), p in zip(differences.items(), ps, strict=True)
    }
