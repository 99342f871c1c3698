"""Reads the users of a split once, and measures rankings and task predictions for them."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from recsys.arrays import Floats, Integers
from recsys.config.evaluation import EvaluationConfig
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.evaluation.metrics import gini, information, intra_list_diversity, list_mean, popularity_percentiles, ranking_metrics
from recsys.evaluation.ranking import Ranked, ScoreUsers, rank_users, summarise
from recsys.evaluation.tasks import PredictTasks, TaskMeasures, measure_tasks
from recsys.evaluation.users import EvaluationUser, read_evaluation_users


def content_vectors(catalogue: ItemFeatures) -> csr_array | None:
    """Describe each item by its categories, or else by its given vector, or else by the words of its text.

    The model's own vectors would let it be its own judge, and no two models could be compared. None where the catalogue has nothing.

    Returns:
        (I + 1, C) of rows of length 1, or 0 where nothing is known of an item.
    """
    if catalogue.categories.any():
        return _normalised(_one_hot(catalogue.categories.numpy(), catalogue.num_categories))
    if catalogue.vectors.any():
        return _normalised(csr_array(catalogue.vectors.numpy(), dtype=np.float64))
    if catalogue.has_text.any():
        return _normalised(HashingVectorizer(alternate_sign=False).transform(catalogue.texts))
    return None


def _one_hot(categories: "np.ndarray[tuple[int, int], np.dtype[np.int32]]", num_categories: int) -> csr_array:
    rows, columns = np.nonzero(categories)
    entries = (np.ones(len(rows)), (rows, categories[rows, columns]))
    return csr_array(entries, shape=(len(categories), num_categories + 1))


def _normalised(vectors: csr_array) -> csr_array:
    return csr_array(normalize(vectors))


@dataclass(frozen=True)
class Judge:
    """Shapes: I items, row 0 for padding."""

    config: EvaluationConfig
    manifest: DatasetManifest
    users: list[EvaluationUser]
    train_count: Integers  # (I + 1,)
    vectors: csr_array | None  # (I + 1, C)

    @classmethod
    def read(cls, dataset: Dataset, catalogue: ItemFeatures, config: EvaluationConfig) -> "Judge":
        """Read the users of `evaluation.split`."""
        users = read_evaluation_users(dataset, config.split)
        return cls(config, dataset.manifest, users, catalogue.train_count.numpy(), content_vectors(catalogue))

    def rank(self, score: ScoreUsers) -> Ranked:
        """Rank all users' targets."""
        return rank_users(score, self.users, self.config, self.train_count == 0)

    def per_user(self, ranked: Ranked) -> dict[str, Floats]:
        """Compute every metric that is a mean over users, (users,) each."""
        metrics = ranking_metrics(ranked.ranks, self.config.cutoffs)
        news, percentiles = information(self.train_count), popularity_percentiles(self.train_count)
        for k in self.config.cutoffs:
            lists = ranked.top[:, :k]
            metrics[f"novelty@{k}"] = list_mean(news, lists)
            metrics[f"popularity_percentile@{k}"] = list_mean(percentiles, lists)
            if self.vectors is not None:
                metrics[f"intra_list_diversity@{k}"] = intra_list_diversity(lists, self.vectors)
        return metrics

    def summarise(self, ranked: Ranked) -> dict[str, float]:
        """Average the metrics over users, and add those of all lists together.

        popularity_lift@k is the mean popularity percentile of what is recommended over that of the users' histories (Abdollahpouri 2019).
        """
        percentiles, num_items = popularity_percentiles(self.train_count), len(self.train_count) - 1
        before = float(np.mean([percentiles[user.history.items].mean() for user in self.users]))
        metrics = summarise(ranked, self.config, num_items)
        metrics |= {name: float(values.mean()) for name, values in self.per_user(ranked).items()}
        for k in self.config.cutoffs:
            metrics[f"gini@{k}"] = gini(ranked.top[:, :k], num_items)
            metrics[f"popularity_lift@{k}"] = metrics[f"popularity_percentile@{k}"] / before
        return metrics

    def tasks(self, predict: PredictTasks) -> TaskMeasures:
        """Measure the tasks that are predicted."""
        return measure_tasks(predict, self.manifest, self.users, self.config.batch_size)
