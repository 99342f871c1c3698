"""Content-based baselines, by the words and categories or by a language model's vectors of items, and a hybrid with item-kNN.

Shapes: B users, I items, C content features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, ValidationRanking
from recsys.baselines.counting import HALF_LIVES, fit_item_knn
from recsys.baselines.training_data import TrainingData, history_matrix, recency_weights
from recsys.config import Config
from recsys.config.model import TextConfig
from recsys.errors import UserError
from recsys.model.text.catalogue_text import frozen_vectors
from recsys.model.text.encoder import locate_backbone

MIXES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Weights of the content that the hybrid chooses from."""


@dataclass(frozen=True)
class ContentMatch(Baseline):
    """Scores an item by the similarity of its content to that of the history; a half life of interactions fades what is old."""

    vectors: Any  # (I + 1, C) rows of norm 1, or 0 without content; sparse or dense
    popularity: Scores  # (I + 1,) smaller than any similarity; orders items without content
    half_life: float

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item against the weighted sum of the history's vectors."""
        matrix = history_matrix(histories, len(self.popularity) - 1, recency_weights(histories, self.half_life))
        similar = (matrix @ self.vectors) @ self.vectors.T
        scores: Scores = np.asarray(similar.toarray() if hasattr(similar, "toarray") else similar, np.float32) + self.popularity
        return scores


@dataclass(frozen=True)
class Hybrid(Baseline):
    """Adds the scores of content and of item-kNN, each scaled to 0 .. 1 over a user's items."""

    content: Baseline
    neighbors: Baseline
    weight: float

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Add both scores."""
        content, neighbors = (_scaled(each.score(histories, users)) for each in (self.content, self.neighbors))
        return self.weight * content + (1 - self.weight) * neighbors


def fit_content_tfidf(data: TrainingData, config: Config) -> Baseline:
    """Match TF-IDF vectors of the texts, and the categories beside them; the validation targets choose the half life."""
    parts, catalogue = [], data.catalogue
    if catalogue.has_text.any():
        parts.append(TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(catalogue.texts))
    if catalogue.categories.any():
        categories = catalogue.categories.numpy()
        rows, columns = np.nonzero(categories)
        shape = (len(categories), catalogue.num_categories + 1)
        parts.append(normalize(csr_array((np.ones(len(rows)), (rows, categories[rows, columns])), shape=shape)))
    if not parts:
        raise UserError("evaluation.baselines: 'content_tfidf' needs item texts or categories; leave it out")
    return _choose(data, csr_array(normalize(hstack(parts))).astype(np.float32))


def fit_content_minilm(data: TrainingData, config: Config) -> Baseline:
    """Match MiniLM's vectors of the texts, less their mean; the validation targets choose the half life."""
    catalogue, scratch = data.catalogue, Path(config.run.scratch)
    if not catalogue.has_text.any():
        raise UserError("evaluation.baselines: 'content_minilm' needs item texts; leave it out")
    text = TextConfig(mode="frozen")
    folder = locate_backbone(text, data.dataset, scratch)
    vectors = frozen_vectors(folder, text, catalogue.texts, data.dataset, scratch, torch.device("cpu")).numpy()
    has_text = catalogue.has_text.numpy()
    centered = np.where(has_text[:, None], vectors - vectors[has_text].mean(0), 0)
    return _choose(data, normalize(centered).astype(np.float32))


def fit_hybrid(data: TrainingData, config: Config) -> Baseline:
    """Join content (TF-IDF) and item-kNN; the validation targets choose the weight."""
    content, neighbors = fit_content_tfidf(data, config), fit_item_knn(data, config)
    return max((Hybrid(content, neighbors, weight) for weight in MIXES), key=ValidationRanking(data))


def _choose(data: TrainingData, vectors: Any) -> Baseline:
    popularity = (1e-4 * data.item_counts / (1 + data.item_counts.max())).astype(np.float32)
    return max((ContentMatch(vectors, popularity, half_life) for half_life in HALF_LIVES), key=ValidationRanking(data))


def _scaled(scores: Scores) -> Scores:
    low = scores[:, 1:].min(1, keepdims=True)
    return (scores - low) / np.maximum(scores[:, 1:].max(1, keepdims=True) - low, np.float32(1e-12))
