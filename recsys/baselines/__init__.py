"""Baselines by name. Each is fitted on a dataset's training data and ranks items like the model."""

from collections.abc import Callable

import torch

from recsys.baselines.baseline import Baseline
from recsys.baselines.click_models import fit_dcn, fit_din
from recsys.baselines.content import fit_content_minilm, fit_content_tfidf, fit_hybrid
from recsys.baselines.counting import fit_item_knn, fit_popularity, fit_recent_popularity
from recsys.baselines.factorization import fit_bpr, fit_factorization_machine, fit_matrix_factorization
from recsys.baselines.sasrec import fit_sasrec
from recsys.baselines.training_data import TrainingData
from recsys.baselines.two_tower import fit_two_tower
from recsys.config import Config
from recsys.config.evaluation import BaselineName
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset

_FITS: dict[BaselineName, Callable[[TrainingData, Config], Baseline]] = {
    "popularity": fit_popularity,
    "recent_popularity": fit_recent_popularity,
    "item_knn": fit_item_knn,
    "bpr": fit_bpr,
    "matrix_factorization": fit_matrix_factorization,
    "factorization_machine": fit_factorization_machine,
    "two_tower": fit_two_tower,
    "sasrec": fit_sasrec,
    "content_tfidf": fit_content_tfidf,
    "content_minilm": fit_content_minilm,
    "hybrid": fit_hybrid,
    "din": fit_din,
    "dcn": fit_dcn,
}


def fit_baseline(name: BaselineName, dataset: Dataset, catalogue: ItemFeatures, config: Config) -> Baseline:
    """Fit a baseline on the training interactions; validation interactions may choose its epoch or settings, test ones are not used.

    The result depends only on the data, the config and `training.seed`; the caller's random state does not change.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)
        return _FITS[name](TrainingData.read(dataset, catalogue), config)


__all__ = ["Baseline", "fit_baseline"]
