"""How far a metric differs between groups of users; which groups training holds together is the config's section `fairness`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.user_groups import MAX_GROUPS
from recsys.errors import UserError
from recsys.evaluation.metrics import Values
from recsys.evaluation.significance import interval_95, resampled_means
from recsys.evaluation.users import EvaluationUser, groups_of

MIN_GROUP_USERS = 30


def fairness_gaps(values: Values, users: Sequence[EvaluationUser], attributes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare the mean of a metric (users,) between the groups of each attribute; without `attributes` of all that have few values.

    The gap is the largest group mean minus the smallest; relative, it is divided by the mean over the users of all compared groups.
    Users without a value and groups with fewer than MIN_GROUP_USERS are left out and counted.

    Raises:
        UserError: no user has an attribute of that name.
    """
    known = groups_of(users)
    for name in attributes:
        if name not in known:
            some = ", ".join(known) or "none: prepare the data with data.users"
            raise UserError(f"evaluation.fairness_attributes: '{name}' is no attribute of this dataset's users; known: {some}")
    chosen = attributes or [name for name, groups in known.items() if len(np.unique(groups)) <= MAX_GROUPS]
    found = {name: _compare(values, known[name]) for name in chosen}
    return {name: gaps for name, gaps in found.items() if len(gaps["groups"]) > 1}


def _compare(values: Values, groups: NDArray[np.str_]) -> dict[str, Any]:
    names, counts = np.unique(groups, return_counts=True)
    is_kept = (counts >= MIN_GROUP_USERS) & (names != "")
    generator = np.random.default_rng(0)
    members = {str(name): values[groups == name] for name in names[is_kept]}
    # Each group is resampled by itself, so that none can vanish from a resample.
    resamples = {name: resampled_means(own[:, None], generator)[:, 0] for name, own in members.items()}
    means = {name: float(own.mean()) for name, own in members.items()}
    counted = {"num_groups_left_out": int((~is_kept).sum()), "num_users_left_out": int(counts[~is_kept].sum())}
    if not members:
        return {"groups": {}, **counted}
    gap = max(means.values()) - min(means.values())
    overall = float(np.concatenate(list(members.values())).mean())
    return {
        "groups": {
            name: {"num_users": len(own), "mean": means[name], "interval_95": interval_95(resamples[name])} for name, own in members.items()
        },
        "gap": gap,
        "interval_95": interval_95(np.ptp(np.stack(list(resamples.values())), axis=0)),
        "relative_gap": gap / overall if overall else 0.0,
        **counted,
    }
