"""Metrics on slices of users and targets, gaps between groups of users, and the paired comparison of two checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.arrays import Floats, Integers, Mask
from recsys.data.labels.training import MAX_GROUPS
from recsys.errors import UserError
from recsys.evaluation.metrics import random_metrics, ranking_metrics
from recsys.evaluation.ranking import Ranked
from recsys.evaluation.significance import bootstrap_intervals, interval_95, resampled_means, sign_flip_p
from recsys.evaluation.users import EvaluationUser, groups_of, target_items

MIN_SLICE_USERS = 10
MIN_GROUP_USERS = 30
NUM_DECILES = 10
COLD, COLD_AMONG_COLD = "cold target", "cold target among cold items"
TARGET_KIND = "target kind "
WARM, WARM_AMONG_WARM = "warm target", "warm target among warm items"


@dataclass(frozen=True)
class Slice:
    """A subset of the targets; their users' other targets are not counted but remain candidates.

    Shapes: U users, T maximum number of targets per user.
    """

    is_target: Mask  # (U, T)
    num_candidates: Integers  # (U,)
    is_within_group: bool = False  # ranked by `group_ranks`

    @property
    def is_member(self) -> Mask:
        """Mask of the users with a target in the slice (U,)."""
        return np.asarray(self.is_target.any(axis=1))

    def metrics(self, ranked: Ranked, cutoff: int) -> dict[str, Floats]:
        """Compute each metric for the slice's users (members,)."""
        ranks = ranked.group_ranks if self.is_within_group else ranked.ranks
        return ranking_metrics(np.where(self.is_target, ranks, 0)[self.is_member], (cutoff,))

    def random(self, cutoff: int) -> dict[str, Floats]:
        """Compute the expectation of each metric for a random order of the candidates (members,)."""
        members = self.is_member
        return random_metrics(self.is_target.sum(1)[members], self.num_candidates[members], (cutoff,))


def find_slices(users: Sequence[EvaluationUser], train_count: Integers, event_kinds: Sequence[str] = ()) -> dict[str, Slice]:
    """Return slices by history length, target, its event kind and user attribute; slices with few users are left out.

    Deciles split the catalogue, most popular items first, into ten parts with a tenth of the training interactions each; cold items are in
    none. Attributes with many values are left out.
    """
    targets = target_items(users)
    num_unseen, num_unseen_cold = _count_candidates(users, train_count)
    lengths = np.array([len(user.history.items) for user in users])
    by_user = {"history 1-10": lengths <= 10, "history 11-50": (lengths > 10) & (lengths <= 50), "history over 50": lengths > 50}
    for attribute, values in groups_of(users).items():
        groups = np.unique(values)
        if len(groups) <= MAX_GROUPS:
            by_user |= {f"{attribute} {group or 'unknown'}": values == group for group in groups}
    is_real = targets > 0
    is_cold = is_real & (train_count[targets] == 0)
    is_warm = is_real & ~is_cold
    deciles = popularity_deciles(train_count)[targets]
    by_target = {WARM: is_warm} | {f"popularity decile {decile}": deciles == decile for decile in range(1, NUM_DECILES + 1)}
    slices = {
        COLD: Slice(is_cold, num_unseen),
        COLD_AMONG_COLD: Slice(is_cold, num_unseen_cold, is_within_group=True),
        **{name: Slice(is_target, num_unseen) for name, is_target in by_target.items()},
        **{name: Slice(is_real & is_member[:, None], num_unseen) for name, is_member in by_user.items()},
        **{name: Slice(is_target, num_unseen) for name, is_target in _by_kind(users, targets, event_kinds).items()},
    }
    if num_unseen_cold.any():
        slices[WARM_AMONG_WARM] = Slice(is_warm, num_unseen - num_unseen_cold, is_within_group=True)
    return {name: each for name, each in slices.items() if each.is_member.sum() >= MIN_SLICE_USERS}


def popularity_deciles(train_count: Integers) -> Integers:
    """Return each item's popularity decile (I + 1,): 1 for the most popular items, 0 for cold ones; see `find_slices`."""
    order = np.argsort(-train_count, kind="stable")
    before = np.empty(len(order), np.int64)
    before[order] = np.cumsum(train_count[order]) - train_count[order]
    deciles: Integers = np.where(train_count > 0, 1 + NUM_DECILES * before // max(1, int(train_count.sum())), 0)
    return deciles


def evaluate_slices(slices: dict[str, Slice], ranked: Ranked, metric: str) -> dict[str, dict[str, Any]]:
    """Average the main metric and the hit rate over each slice's users, and add the expectation of a random order."""
    cutoff = int(metric.partition("@")[2])
    names = tuple(dict.fromkeys((metric, f"hr@{cutoff}")))
    result = {}
    for name, each in slices.items():
        found, by_chance = each.metrics(ranked, cutoff), each.random(cutoff)
        result[name] = {
            "num_users": int(each.is_member.sum()),
            **{metric: float(found[metric].mean()) for metric in names},
            "interval_95": bootstrap_intervals({metric: found[metric] for metric in names}),
            "random": {metric: float(by_chance[metric].mean()) for metric in names},
        }
    return result


def _by_kind(users: Sequence[EvaluationUser], targets: Integers, event_kinds: Sequence[str]) -> dict[str, Mask]:
    """Return, by event kind, which targets (U, T) have an event of that kind; empty if all are of one kind."""
    rows = np.repeat(np.arange(len(users)), [len(user.targets.items) for user in users])
    items, kinds = (np.concatenate([getattr(user.targets, name) for user in users]) for name in ("items", "events"))
    found = np.unique(kinds).tolist()
    masks = {}
    for kind in found if len(found) > 1 and event_kinds else ():
        is_kind = kinds == kind
        columns = np.argmax(targets[rows[is_kind]] == items[is_kind, None], axis=1)
        mask = np.zeros(targets.shape, bool)
        mask[rows[is_kind], columns] = True
        masks[f"{TARGET_KIND}{event_kinds[kind]}"] = mask
    return masks


def _count_candidates(users: Sequence[EvaluationUser], train_count: Integers) -> tuple[Integers, Integers]:
    """Count each user's unseen items, and the cold ones among them."""
    is_cold = train_count[1:] == 0
    seen = [user.seen for user in users]
    num_seen = np.array([len(items) for items in seen])
    num_cold_seen = np.array([is_cold[items - 1].sum() for items in seen], np.int64)
    return len(is_cold) - num_seen, is_cold.sum() - num_cold_seen


def fairness_gaps(values: Floats, users: Sequence[EvaluationUser], attributes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare the mean of a metric (users,) between the groups of each attribute; without `attributes`, of all with few values.

    The gap is the largest group mean minus the smallest; the relative gap is divided by the mean over the users of all compared groups.
    Users without a value and groups with fewer than MIN_GROUP_USERS are left out and counted.

    Raises:
        UserError: no user has an attribute of that name.
    """
    known = groups_of(users)
    for name in attributes:
        if name not in known:
            some = ", ".join(known) or "none: prepare the data with data.users"
            raise UserError(f"evaluation.fairness_attributes: '{name}' is not an attribute of this dataset's users; known: {some}")
    chosen = attributes or [name for name, groups in known.items() if len(np.unique(groups)) <= MAX_GROUPS]
    found = {name: _compare(values, known[name]) for name in chosen}
    return {name: gaps for name, gaps in found.items() if len(gaps["groups"]) > 1}


def _compare(values: Floats, groups: NDArray[np.str_]) -> dict[str, Any]:
    names, counts = np.unique(groups, return_counts=True)
    is_kept = (counts >= MIN_GROUP_USERS) & (names != "")
    left_out = {"num_groups_left_out": int((~is_kept).sum()), "num_users_left_out": int(counts[~is_kept].sum())}
    members = {str(name): values[groups == name] for name in names[is_kept]}
    if not members:
        return {"groups": {}, **left_out}
    generator = np.random.default_rng(0)
    # Each group is resampled by itself, so that none can vanish from a resample.
    resamples = {name: resampled_means(own[:, None], generator)[:, 0] for name, own in members.items()}
    means = {name: float(own.mean()) for name, own in members.items()}
    gap, overall = max(means.values()) - min(means.values()), float(np.concatenate(list(members.values())).mean())
    return {
        "groups": {
            name: {"num_users": len(own), "mean": means[name], "interval_95": interval_95(resamples[name])} for name, own in members.items()
        },
        "gap": gap,
        "interval_95": interval_95(np.ptp(list(resamples.values()), axis=0)),
        "relative_gap": gap / overall if overall else 0.0,
        **left_out,
    }


def compare(ranked: Ranked, other: Ranked, slices: dict[str, Slice], cutoffs: tuple[int, ...], metric: str) -> dict[str, Any]:
    """Compare two rankings of the same users by paired tests of the ranking metrics; per slice, of the main metric only.

    Each difference is `ranked` minus `other`, with a 95 % interval of paired resamples and a two-sided p-value of sign flips.
    """
    mine, theirs = (ranking_metrics(each.ranks, cutoffs) for each in (ranked, other))
    cutoff = int(metric.partition("@")[2])
    in_slices = {name: (each.metrics(ranked, cutoff)[metric], each.metrics(other, cutoff)[metric]) for name, each in slices.items()}
    return {
        "metrics": {
            name: {"value": float(mine[name].mean()), "other": float(theirs[name].mean()), **difference}
            for name, difference in _test_differences({name: mine[name] - theirs[name] for name in mine}).items()
        },
        "slices": {name: _test_differences({metric: own - others}) for name, (own, others) in in_slices.items()},
    }


def sentence(compared: dict[str, Any], metric: str) -> str:
    """Return the comparison by one metric as one line."""
    found = compared["metrics"][metric]
    low, high = found["interval_95"]
    return (
        f"{metric} {found['value']:.4f} against {found['other']:.4f} of {compared['checkpoint']}: "
        f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p = {found['p']:.4f}"
    )


def _test_differences(differences: dict[str, Floats]) -> dict[str, dict[str, Any]]:
    ps = sign_flip_p(np.stack(list(differences.values()), axis=1))
    intervals = bootstrap_intervals(differences)
    return {
        name: {"difference": float(values.mean()), "interval_95": intervals[name], "p": float(p)}
        for (name, values), p in zip(differences.items(), ps, strict=True)
    }
