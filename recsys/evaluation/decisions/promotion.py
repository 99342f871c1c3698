"""Compares a new version with the one in production on the same users and targets, and decides which one is served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from recsys.arrays import Floats, Integers, Mask, Scores
from recsys.config.evaluation import EvaluationConfig
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.evaluation.exposures import ExposedTargets
from recsys.evaluation.measures import Measures, deciding_vectors
from recsys.evaluation.significance import Interval, bootstrap_intervals, measure_intervals
from recsys.evaluation.tasks import TaskMeasures, measure_tasks, predict_all, predict_by
from recsys.evaluation.users import EvaluationUser, read_evaluation_users
from recsys.metric_names import broken_guards, oriented
from recsys.predictor import Predictor

Rule = Literal["if_no_worse", "if_better", "always", "never"]


@dataclass(frozen=True)
class Change:
    """One metric of the new and the old version, and the 95 % interval of the difference; a metric of all lists together has none."""

    new: float
    old: float
    interval: Interval | None = None

    @property
    def difference(self) -> float:
        """New minus old."""
        return self.new - self.old

    def __str__(self) -> str:
        bounds = "" if self.interval is None else f" [{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"
        return f"{self.new:.4f} against {self.old:.4f}: {self.difference:+.4f}{bounds}"


def decide(changes: Mapping[str, Change], metric: str, guards: Mapping[str, float], rule: Rule) -> tuple[bool, str]:
    """Return whether the new version replaces the old one, and why.

    `if_better`: the metric is better. `if_no_worse`: the 95 % interval of its difference reaches 0; without an interval, the difference
    itself must. Both: no guarded metric gets worse by more than its guard allows.
    """
    change = changes[metric]
    bounds = change.interval or (change.difference, change.difference)
    best_case = max(oriented(bound, metric) for bound in bounds)
    is_better = oriented(change.difference, metric) > 0
    if not (is_better if rule == "if_better" else best_case >= 0):  # also refuses NaN
        return False, f"{'not better' if rule == 'if_better' else 'worse'} by {metric} {change}"
    if broken := broken_guards({name: each.difference for name, each in changes.items()}, guards):
        return False, f"breaks evaluation.guards: {broken[0]} {changes[broken[0]]}"
    return True, f"{'better' if is_better else 'no worse'} by {metric} {change}"


def compare_versions(new: Predictor, old: Predictor, dataset: Dataset, config: EvaluationConfig, scratch: Path) -> dict[str, Change]:
    """Evaluate two versions on the validation targets of a dataset, by `config.metric` and each of `config.guards`.

    A version trained on another dataset knows items and event kinds by their ids. Items that it does not know are left out of histories
    and ranked last; task metrics are measured on the targets whose items both know.

    Raises:
        UserError: one of the versions does not give a metric.
    """
    catalogue, users = ItemFeatures.read(dataset, scratch), read_evaluation_users(dataset, "validation", config)
    names = list(dict.fromkeys((config.metric, *config.guards)))
    exposed = ExposedTargets.read(dataset, "validation") if dataset.manifest.has_exposures else None
    measures = Measures(config, dataset.manifest, users, catalogue.train_count.numpy(), deciding_vectors(config, catalogue), exposed)
    both = [Guest.of(predictor, dataset, catalogue.item_ids) for predictor in (new, old)]
    changes = _list_changes(measures, *both) if any("@" in name for name in names) else {}
    if any("@" not in name for name in names):
        changes |= _task_changes(measures, *both)
    if missing := [name for name in names if name not in changes]:
        raise UserError(
            f"evaluation.metric, evaluation.guards: '{missing[0]}' is not given by both versions on {dataset.uri}; "
            "export.promote = 'always' would work"
        )
    return {name: changes[name] for name in names}


@dataclass(frozen=True)
class Guest:
    """A predictor that answers for users of a dataset which may not be its own. Shapes: B users, I items of the dataset."""

    predictor: Predictor
    items: Integers  # (I + 1,) the predictor's catalogue index of each item of the dataset, 0 if it does not know the item
    kinds: Integers  # the predictor's number of each event kind of the dataset, -1 if it does not know the kind

    @classmethod
    def of(cls, predictor: Predictor, dataset: Dataset, item_ids: Sequence[str]) -> "Guest":
        """Map a dataset's items and event kinds to those of a predictor, by their ids."""
        items = np.array([0, *(predictor.item_index.get(item_id, 0) for item_id in item_ids[1:])])
        return cls(predictor, items, np.array([predictor.event_index.get(kind, -1) for kind in dataset.manifest.event_kinds]))

    def score(self, users: Sequence[EvaluationUser]) -> Scores:
        """Score all items of the dataset (B, I + 1) as its lists are ordered, unknown ones with -inf.

        A user without a known item gets the popular items.
        """
        histories = [self._known(user.history) for user in users]
        others = np.setdiff1d(np.arange(1, len(self.predictor.catalogue.item_ids)), self.items)  # items that the dataset does not have
        scores = self.predictor.score_lists(histories, [np.append(others, self.items[user.seen]) for user in users])
        has_history = np.array([len(history.items) > 0 for history in histories])
        scores[~has_history] = self.predictor.popularity.numpy()
        return np.where(self.items > 0, scores[:, self.items], np.float32(-np.inf))

    def knows(self, user: EvaluationUser) -> Mask:
        """Return which of the user's targets it can score; none without a known history, unless histories have a place before."""
        is_known_user = self.predictor.manifest.has_exposures or len(self._known(user.history).items) > 0
        return np.asarray((self.items[user.targets.items] > 0) & is_known_user)

    def translated(self, user: EvaluationUser) -> EvaluationUser:
        """Return the user with the predictor's item indices and event kinds; all targets must be known."""
        return replace(user, history=self._known(user.history), targets=Sequences.of(self.items[user.targets.items]))

    def _known(self, interactions: Sequences) -> Sequences:
        items, kinds = self.items[interactions.items], self.kinds[interactions.events]
        kept = (items > 0) & (kinds >= 0)
        return Sequences.of(items[kept], kinds[kept], interactions.timestamps[kept], interactions.values[kept])


def _list_changes(measures: Measures, new: Guest, old: Guest) -> dict[str, Change]:
    ranked = [measures.rank(guest.score) for guest in (new, old)]
    new_means, old_means = map(measures.summarize, ranked)
    mine, theirs = map(measures.per_user, ranked)
    intervals = bootstrap_intervals({name: mine[name] - theirs[name] for name in mine})
    return {name: Change(value, old_means[name], intervals.get(name)) for name, value in new_means.items() if name in old_means}


def _task_changes(measures: Measures, new: Guest, old: Guest) -> dict[str, Change]:
    mine, theirs = _measure_tasks(measures, new, old)
    names = [name for name in mine.measures if name in theirs.measures]
    differences = {name: partial(_difference, mine, theirs, name) for name in names}
    intervals, values, others = measure_intervals(differences, mine.num_users), mine.values(), theirs.values()
    return {name: Change(values[name], others[name], intervals[name]) for name in names}


def _difference(mine: TaskMeasures, theirs: TaskMeasures, name: str, counts: Floats) -> float:
    return mine.measures[name](counts) - theirs.measures[name](counts)


def _measure_tasks(measures: Measures, *both: Guest) -> list[TaskMeasures]:
    """Measure the tasks of two versions on the targets and the exposures whose items both know."""
    everyone = [*measures.users, *(measures.exposed.users if measures.exposed else ())]
    known = [np.logical_and(*(guest.knows(user) for guest in both)) for user in everyone]
    is_kept = np.concatenate([np.zeros(0, bool), *known])
    users = [_with_targets(user, np.flatnonzero(own)) for user, own in zip(everyone, known, strict=True) if own.any()]
    if not users:
        return [TaskMeasures(0, {}, {}, {}) for _ in both]
    kept, measured = measures.labelled({}, {}).where(is_kept), []
    distinct, owners = np.unique(kept.owners, return_inverse=True)
    for guest in both:
        predictions = predict_all(predict_by(guest.predictor), [guest.translated(user) for user in users], measures.config.batch_size)
        measured.append(measure_tasks(replace(kept, predictions=predictions, owners=owners), measures.manifest, len(distinct)))
    return measured


def _with_targets(user: EvaluationUser, places: Integers) -> EvaluationUser:
    rows = user.targets.starts[0] + places
    columns = {name: column[rows] for name, column in user.targets.columns.items()}
    return replace(user, targets=Sequences(columns, np.zeros(1, np.int64), np.array([len(rows)])))
