"""All metrics of a split's users: of their rankings, their lists and their tasks, for models and baselines alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from recsys.arrays import Floats, Integers
from recsys.config.evaluation import EvaluationConfig
from recsys.data.items import ItemFeatures
from recsys.data.manifest import DatasetManifest
from recsys.evaluation.diversity import content_vectors
from recsys.evaluation.exposures import ExposedTargets
from recsys.evaluation.metrics import gini, information, intra_list_diversity, list_mean, popularity_percentiles, ranking_metrics
from recsys.evaluation.ranking import Ranked, ScoreUsers, rank_users, summarize
from recsys.evaluation.tasks import Labelled, Predictions, TaskMeasures, labelled_targets, measure_tasks
from recsys.evaluation.users import EvaluationUser


def deciding_vectors(config: EvaluationConfig, catalogue: ItemFeatures) -> csr_array | None:
    """Return the content vectors of items if a metric that decides needs them."""
    is_needed = any(name.startswith("intra_list_diversity") for name in (config.metric, *config.guards))
    return content_vectors(catalogue) if is_needed else None


@dataclass(frozen=True)
class Measures:
    """Measures rankings and task predictions on the users of a split, in the same way for models and baselines. Shapes: I items."""

    config: EvaluationConfig
    manifest: DatasetManifest
    users: Sequence[EvaluationUser]
    train_count: Integers  # (I + 1,) 0 for padding
    vectors: csr_array | None  # (I + 1, C)
    exposed: ExposedTargets | None = None

    def rank(self, score: ScoreUsers) -> Ranked:
        """Rank the targets of all users."""
        return rank_users(score, self.users, self.config, self.train_count == 0)

    def per_user(self, ranked: Ranked) -> dict[str, Floats]:
        """Compute the metrics that are averaged over users, (users,) each."""
        metrics = ranking_metrics(ranked.ranks, self.config.cutoffs)
        news = information(self.train_count)
        for k in self.config.cutoffs:
            lists = ranked.top[:, :k]
            metrics[f"novelty@{k}"] = list_mean(news, lists)
            metrics[f"popularity_percentile@{k}"] = list_mean(self._percentiles, lists)
            if self.vectors is not None:
                metrics[f"intra_list_diversity@{k}"] = intra_list_diversity(lists, self.vectors)
        return metrics

    def summarize(self, ranked: Ranked) -> dict[str, float]:
        """Average the metrics over users, and add the metrics of all lists together.

        popularity_lift@k is the mean popularity percentile of the recommended items over that of the users' histories (Abdollahpouri 2019).
        """
        num_items = len(self.train_count) - 1
        metrics = summarize(ranked, self.config, num_items)
        metrics |= {name: float(values.mean()) for name, values in self.per_user(ranked).items()}
        for k in self.config.cutoffs:
            metrics[f"gini@{k}"] = gini(ranked.top[:, :k], num_items)
            metrics[f"popularity_lift@{k}"] = metrics[f"popularity_percentile@{k}"] / self._percentile_before
            metrics |= {f"{name}_share@{k}": share for name, share in self._task_shares(ranked.top[:, :k]).items()}
        return metrics

    def _task_shares(self, lists: Integers) -> dict[str, float]:
        """Return, for each binary task, the mean label of the targets with a label in the lists (users, k); 0 if there is none."""
        (found, keys, order), width = self._target_labels, len(self.train_count)
        asked = (np.arange(len(lists))[:, None] * width + lists)[lists > 0]
        places = order[np.searchsorted(keys[order], asked).clip(max=len(keys) - 1)]
        hits = places[keys[places] == asked]
        shares = {}
        for column, task in enumerate(self.manifest.tasks):
            known = hits[found.mask[hits, column] > 0]
            if task.kind == "binary" and found.mask[:, column].any():
                shares[task.name] = float(found.labels[known, column].mean()) if len(known) else 0.0
        return shares

    def labelled(self, predictions: Predictions, of_exposures: Predictions) -> Labelled:
        """Join predictions of all users' targets and of all exposures with the labels."""
        found, exposed = labelled_targets(predictions, self.manifest, self.users), self.exposed
        if exposed is None or not len(exposed.owners):
            return found
        numbers = {user.user_index: number for number, user in enumerate(self.users)}
        owners = np.array([numbers.setdefault(index, len(numbers)) for index in exposed.owners.tolist()], np.int64)
        return Labelled(
            {name: np.concatenate([values, of_exposures[name]]) for name, values in predictions.items() if name in of_exposures},
            np.concatenate([found.labels, exposed.labels]),
            np.concatenate([found.mask, exposed.mask]),
            np.concatenate([found.owners, owners]),
        )

    def tasks(self, labelled: Labelled) -> TaskMeasures:
        """Measure the predicted tasks."""
        num_users = max(len(self.users), 1 + int(labelled.owners.max(initial=-1)))
        return measure_tasks(labelled, self.manifest, num_users)

    def task_slices(self, labelled: Labelled) -> dict[str, TaskMeasures]:
        """Measure the tasks on the exposures of each slice of `data.columns.slices`."""
        exposed = self.exposed
        if exposed is None or not len(exposed.owners):
            return {}
        num_targets = len(labelled.owners) - len(exposed.owners)
        names = sorted({name for own in exposed.slices for name in own})
        masks = {name: np.array([False] * num_targets + [name in own for own in exposed.slices]) for name in names}
        return {name: self.tasks(labelled.where(mask)) for name, mask in masks.items()}

    @cached_property
    def _target_labels(self) -> tuple[Labelled, Integers, Integers]:
        """The labels of the targets, a number for each target's user and item, and the order of these numbers."""
        found = labelled_targets({}, self.manifest, self.users)
        keys = found.owners * len(self.train_count) + np.concatenate([user.targets.items for user in self.users])
        return found, keys, np.argsort(keys, kind="stable")

    @cached_property
    def _percentiles(self) -> Floats:
        return popularity_percentiles(self.train_count)

    @cached_property
    def _percentile_before(self) -> float:
        return float(np.mean([self._percentiles[user.history.items].mean() for user in self.users]))
