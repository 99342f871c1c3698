"""The rate of positives of each binary task in the training data."""

import numpy as np
import torch
from torch import Tensor

from recsys.config.model import RankerConfig
from recsys.data.batch import task_labels
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.data.shards import RowGroupSource

MAX_ROW_GROUPS = 64
"""Labels are counted in at most this many row groups, spread evenly over the shards."""


def negative_rates(dataset: Dataset, ranker: RankerConfig) -> Tensor:
    """Return how much training sees of each task's negatives, as against its positives, (T,) float32.

    `sample` keeps the share of them that leaves `negatives_per_positive`; `weight` weighs positives by negatives / positives, which is
    to weigh negatives by the inverse. Regression has no negatives: 1, as with no balance asked for.
    """
    tasks = dataset.manifest.tasks
    is_binary = torch.tensor([task.kind == "binary" for task in tasks], dtype=torch.bool)
    if ranker.imbalance == "none" or not is_binary.any():
        return torch.ones(len(tasks))
    positives, labels = count_labels(dataset)
    odds = positives.clamp(min=1) / (labels - positives).clamp(min=1)
    rates = odds if ranker.imbalance == "weight" else (odds * ranker.negatives_per_positive).clamp(max=1)
    return torch.where(is_binary, rates, 1.0).float()


def count_labels(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Count the positive and all labels of each task in some row groups of the training data, (T,) float64 each."""
    manifest = dataset.manifest
    num_groups = sum(len(shard.row_groups) for shard in manifest.train_shards)
    source = RowGroupSource(dataset, ["items", "events", "values", "first_target"])
    positives, labels = torch.zeros(2, len(manifest.tasks), dtype=torch.float64)
    for group in np.unique(np.linspace(0, num_groups - 1, min(num_groups, MAX_ROW_GROUPS)).astype(np.int64)).tolist():
        samples = Sequences.from_table(source.read(group))
        targets = samples.within(samples.scalars["first_target"], samples.lengths)
        label, mask = task_labels(manifest, torch.from_numpy(targets.events), torch.from_numpy(targets.values))
        positives += (label * mask).sum(0, dtype=torch.float64)
        labels += mask.sum(0, dtype=torch.float64)
    return positives, labels
