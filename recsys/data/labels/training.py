"""The draw of negative labels, and user groups."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Integers
from recsys.config.model import RankerConfig
from recsys.data.draws import stable_hash
from recsys.data.labels.tasks import exposure_labels, task_labels
from recsys.data.manifest import USER_INDEX, Dataset
from recsys.data.sequences import Sequences
from recsys.data.shards import RowGroupSource
from recsys.errors import UserError
from recsys.schema import EXPOSURE_COLUMNS

MAX_GROUPS = 25
NUM_DISPLAYS = 200
"""Positions of display beyond this one share a bias."""

NO_GROUP = -1

MAX_ROW_GROUPS = 64
"""Labels are counted in at most this many row groups, spread evenly over the shards."""


def keep_negatives(labels: Tensor, sample_ids: Tensor, places: Tensor, rates: Tensor) -> Tensor:
    """Return which labels (N, T) are kept: all positives, and negatives with probability `rates` (T,).

    The draw depends on the sample id and the place in the sample (N,), so it is the same in every epoch and on every rank. With shuffled
    histories a place holds another interaction in each epoch, so other negatives are kept.
    """
    kept = torch.ones_like(labels)
    for task in torch.nonzero(rates < 1).flatten().tolist():
        uniform = stable_hash(stable_hash(sample_ids, task) + places, 0).double() / 2**63
        kept[:, task] = ((labels[:, task] > 0) | (uniform < rates[task])).float()
    return kept


def negative_rates(dataset: Dataset, ranker: RankerConfig) -> Tensor:
    """Return the weight of each task's negatives in training, relative to its positives, (T,) float32.

    `sample`: the share of negatives to keep for `negatives_per_positive`. `weight`: positives / negatives, since positives are weighted by
    the inverse. Regression tasks, and all tasks without `imbalance`, have 1.
    """
    tasks = dataset.manifest.tasks
    is_binary = torch.tensor([task.kind == "binary" for task in tasks], dtype=torch.bool)
    if ranker.imbalance == "none" or not is_binary.any():
        return torch.ones(len(tasks))
    positives, labels = count_labels(dataset)
    odds = positives.clamp(min=1) / (labels - positives).clamp(min=1)
    rates = odds if ranker.imbalance == "weight" else (odds * ranker.negatives_per_positive).clamp(max=1)
    return torch.where(is_binary, rates, 1.0).float()


def _some_samples(dataset: Dataset, columns: list[str]) -> Iterator[Sequences]:
    """Read some columns of at most MAX_ROW_GROUPS row groups, spread evenly over the training data."""
    source = RowGroupSource(dataset, columns)
    for group in np.unique(np.linspace(0, len(source) - 1, min(len(source), MAX_ROW_GROUPS)).astype(np.int64)).tolist():
        yield Sequences.from_table(source.read(group))


def count_labels(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the number of positive labels and of all labels per task in some row groups of the training data, (T,) float64 each."""
    shown = EXPOSURE_COLUMNS if dataset.manifest.has_exposures else ()
    positives, labels = torch.zeros(2, len(dataset.manifest.tasks), dtype=torch.float64)
    is_target = dataset.manifest.target_kinds
    for samples in _some_samples(dataset, ["items", "events", "values", "first_target", *shown]):
        targets = samples.within(samples.scalars["first_target"], samples.lengths)
        chosen = is_target[targets.events]
        pairs = [task_labels(dataset.manifest, targets.events[chosen], targets.values[chosen])]
        if samples.exposures is not None:
            pairs.append(exposure_labels(dataset.manifest, samples.exposures.flat("labels"), samples.exposures.flat("known")))
        for label, mask in pairs:
            positives += torch.from_numpy((label * mask).sum(0, dtype=np.float64))
            labels += torch.from_numpy(mask.sum(0, dtype=np.float64))
    return positives, labels


def display_shares(dataset: Dataset) -> Tensor | None:
    """Return the share of each position of display among the exposures in some row groups (NUM_DISPLAYS + 1,); None if none is known."""
    if not dataset.manifest.has_exposures:
        return None
    counts = np.zeros(NUM_DISPLAYS + 1)
    for samples in _some_samples(dataset, ["items", *EXPOSURE_COLUMNS]):
        shown = samples.exposures
        assert shown is not None
        counts += np.bincount(shown.flat("displays").clip(max=NUM_DISPLAYS), minlength=NUM_DISPLAYS + 1)
    return torch.from_numpy(counts / counts.sum()).float() if counts[1:].any() else None


def read_groups(dataset: Dataset, attribute: str) -> tuple[pa.Table, list[str], list[str]]:
    """Return the users with `num_train`, their values of an attribute (empty if unknown), and the group names.

    Raises:
        UserError: the attribute does not have 2 to MAX_GROUPS values.
    """
    users = dataset.read_users([USER_INDEX, "attributes", "num_train"])
    values = [dict(attributes or []).get(attribute) or "" for attributes in users["attributes"].to_pylist()]
    names = sorted(set(values) - {""})
    if not 1 < len(names) <= MAX_GROUPS:
        known = sorted({name for attributes in users["attributes"].to_pylist() for name, _ in attributes or []})
        raise UserError(
            f"fairness.attribute = {attribute}: has {len(names)} values in the users table; 2 to {MAX_GROUPS} are needed; "
            f"attributes: {', '.join(known) or 'none'}"
        )
    return users, values, names


@dataclass(frozen=True)
class UserGroups:
    """The values of a user attribute, and the value of each training sample's user."""

    names: tuple[str, ...]
    of_sample: NDArray[np.int8]  # (samples,) index into `names`, NO_GROUP if unknown
    shares: tuple[float, ...]  # share of the training targets per group

    @classmethod
    def read(cls, dataset: Dataset, attribute: str) -> "UserGroups":
        """Read one attribute of all users; keeps one byte per training sample in memory.

        Raises:
            UserError: the attribute does not have 2 to MAX_GROUPS values.
        """
        users, values, names = read_groups(dataset, attribute)
        number = {"": NO_GROUP} | {name: index for index, name in enumerate(names)}
        indices = users[USER_INDEX].to_numpy()
        of_user = np.full(int(indices.max()) + 1, NO_GROUP, np.int8)
        of_user[indices] = [number[value] for value in values]
        owners = [dataset.read_shard(shard, [USER_INDEX])[USER_INDEX].to_numpy() for shard in dataset.manifest.train_shards]
        num_targets = np.maximum(users["num_train"].to_numpy() - 1, 0)
        shares = [num_targets[of_user[indices] == group].sum() / num_targets.sum() for group in range(len(names))]
        return cls(tuple(names), of_user[np.concatenate(owners)], tuple(map(float, shares)))

    def mask(self, sample_ids: Integers) -> NDArray[np.float32]:
        """Return the groups of samples (N,) as a mask (N, G) of ones and zeros; zeros for a sample without a group."""
        return (self.of_sample[sample_ids][:, None] == np.arange(len(self.names))).astype(np.float32)
