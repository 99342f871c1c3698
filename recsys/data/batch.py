"""A micro batch, and building one from samples."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Integers
from recsys.data.draws import sample_draws, stable_hash
from recsys.data.manifest import DatasetManifest
from recsys.data.sequences import CPU_GROUP_COST, Histories, Rows, map_tensors, pack, ranges
from recsys.data.text.queries import QueryDraws
from recsys.data.user_groups import UserGroups
from recsys.schema import PADDING_ITEM


@dataclass(frozen=True)
class Batch:
    """One micro batch. Shapes: B samples, P places of their histories, N targets, D distinct items, T tasks, G groups, K negatives.

    `histories.items`, `targets` and `negatives` are positions in `items`; `items` are catalogue indices, and `items[0]` is padding.
    The targets of Q queries are the last of the N.
    """

    sample_ids: Tensor  # (B,)
    items: Tensor  # (D,)
    items_on_host: Integers  # (D,) the same, which stays on the CPU; where texts are kept, those of histories and targets alone
    histories: Histories
    target_places: Tensor  # (N,) the place that each target comes after
    targets: Tensor  # (N,)
    labels: Tensor  # (N, T) of the target
    label_mask: Tensor  # (N, T) 1 where there is a label
    group_mask: Tensor  # (N, G) 1 where the target's user is in the group; no columns where no groups are compared
    negatives: Tensor  # (K,) empty where the loss draws none
    negatives_log_q: Tensor  # (K,) log probability that one draw gives this item
    query_texts: Integers | None = None  # (Q,) rows of `QueryTexts`, on the CPU; None where training asks nothing

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting where the memory is pinned."""
        moved: Batch = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin(self) -> "Batch":
        """Move to page-locked memory, from which a GPU copies in the background."""
        pinned: Batch = map_tensors(self, Tensor.pin_memory)
        return pinned

    def valid_counts(self) -> Tensor:
        """Count retrieval targets, labels by task and targets by group, (1 + T + G,), in float64 since they are summed over ranks."""
        counts = torch.cat([self.label_mask.new_tensor([len(self.targets)]), self.label_mask.sum(0), self.group_mask.sum(0)])
        return counts.to(torch.float64)


def task_labels(manifest: DatasetManifest, events: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of each task and whether there is one, both (..., T) float32.

    `events` are kinds from 0, `values` NaN where missing; regression labels are standardised over the training data.
    """
    labels, masks = [], []
    for task in manifest.tasks:
        if task.event is not None:
            labels.append((events >= manifest.event_kinds.index(task.event)).float())
            masks.append(torch.ones_like(values))
            continue
        has_value = ~values.isnan()
        known = torch.where(has_value, values, 0.0)
        standardised = (known - manifest.value_mean) / manifest.value_std
        labels.append(standardised if task.threshold is None else (known >= task.threshold).float())
        masks.append(has_value.float())
    if not labels:
        nothing = torch.zeros((*values.shape, 0))
        return nothing, nothing
    return torch.stack(labels, -1), torch.stack(masks, -1)


def keep_negatives(labels: Tensor, sample_ids: Tensor, places: Tensor, rates: Tensor) -> Tensor:
    """Draw which labels (N, T) are kept: positives all, negatives with probability `rates` (T,), where that is below 1.

    A target, known by its sample's id and its place in the sample (N,), is drawn alike in every epoch and on every rank; of shuffled
    histories a place has another interaction in each epoch, and so others are kept.
    """
    kept = torch.ones_like(labels)
    for task in torch.nonzero(rates < 1).flatten().tolist():
        uniform = stable_hash(stable_hash(sample_ids, task) + places, 0).double() / 2**63
        kept[:, task] = ((labels[:, task] > 0) | (uniform < rates[task])).float()
    return kept


def shuffle_histories(rows: Rows, seed: int, epoch: int) -> Rows:
    """Put each row's interactions in an order of its own, which follows from the sample, the seed and the epoch alone."""
    starts, lengths = rows.starts.astype(np.int64), rows.lengths.astype(np.int64)
    source, owners = ranges(starts, lengths), np.repeat(np.arange(len(rows)), lengths)
    draws = sample_draws(torch.from_numpy(rows.sample_ids), seed, epoch)[owners]
    keys = stable_hash(draws + torch.from_numpy(source - starts[owners]), 3)  # by 0 to 2 the queries are drawn
    order = source[np.lexsort((keys.numpy(), owners))]
    flat = {name: column[order] for name, column in rows.flat.items()}
    return dataclasses.replace(rows, starts=np.cumsum(lengths) - lengths, flat=flat)


def cut_histories(rows: Rows, max_history: int, stride: int) -> Rows:
    """Cut rows of more than `max_history` + 1 interactions as `cut_windows` cuts sequences: every target stays one, exactly once."""
    lengths, first = rows.lengths.astype(np.int64), rows.first_target.astype(np.int64)
    is_long = lengths > max_history + 1
    if not is_long.any():
        return rows
    num_pieces = np.where(is_long, -(-(lengths - first) // stride), 1)
    owners, numbers = np.repeat(np.arange(len(rows)), num_pieces), ranges(np.zeros_like(num_pieces), num_pieces)
    ends = lengths[owners] - numbers * stride
    begins = np.maximum(ends - (max_history + 1), 0)
    first_targets = np.where(is_long[owners], np.maximum(ends - stride, first[owners]), first[owners]) - begins
    starts = rows.starts.astype(np.int64)[owners] + begins
    return Rows(rows.sample_ids[owners], first_targets.astype(np.int32), starts, ends - begins, rows.flat)


@dataclass(frozen=True)
class Collator:
    """Turns rows of the training shards into a `Batch`; with a `shuffle_seed`, every epoch has its histories in another order.

    Rows of a dataset that was prepared for longer histories than `max_history` are cut, the pieces `stride` targets apart.
    """

    manifest: DatasetManifest
    takes_whole_catalogue: bool
    group_cost: int = CPU_GROUP_COST
    groups: UserGroups | None = None
    negative_rates: Tensor | None = None  # (T,) of the negative labels, the share that is kept
    queries: QueryDraws | None = None
    shuffle_seed: int | None = None
    keeps_texts: bool = False
    max_history: int | None = None
    stride: int | None = None

    def __call__(self, rows: Rows, negatives: Tensor, negatives_log_q: Tensor, epoch: int = 0) -> Batch:
        """Build a micro batch; no rows give one place of padding, so that every rank runs every step."""
        if len(rows) == 0:
            rows = Rows(np.array([-1]), np.array([1], np.int32), np.array([0]), np.array([1]), {"items": np.zeros(1, np.int32)})
        elif self.shuffle_seed is not None:
            rows = shuffle_histories(rows, self.shuffle_seed, epoch)
        sample_ids_of_rows = rows.sample_ids
        if self.max_history is not None:
            rows = cut_histories(rows, self.max_history, self.stride or self.max_history)
        lengths = rows.lengths.astype(np.int64) - 1  # the last interaction is a target alone
        starts, first_target = rows.starts.astype(np.int64), rows.first_target.astype(np.int64)
        num_targets = lengths + 1 - first_target
        samples, after = np.repeat(np.arange(len(rows)), num_targets), ranges(first_target, num_targets)  # of each target
        asked = None if self.queries is None else self.queries(rows, epoch)
        all_starts, all_lengths, has_query = (starts, lengths, None) if asked is None else asked.histories(starts, lengths)
        histories, first_places = pack(rows.flat, all_starts, all_lengths, self.group_cost, has_query)
        target_places = torch.from_numpy(first_places[samples] + after - 1)
        if asked is not None and histories.query_places is not None:
            samples, after = np.append(samples, asked.samples), np.append(after, asked.targets)
            target_places = torch.cat([target_places, histories.query_places])
        sample_ids, places = rows.sample_ids[samples], starts[samples] + after
        labels, label_mask = task_labels(self.manifest, *(self._column(rows, name, places) for name in ("events", "values")))
        if self.negative_rates is not None:
            label_mask = label_mask * keep_negatives(labels, torch.from_numpy(sample_ids), torch.from_numpy(after), self.negative_rates)
        wanted = self._column(rows, "items", places).long()
        items, (history, targets, negatives) = self._index_items(histories.items, wanted, negatives)
        return Batch(
            sample_ids=torch.tensor(sample_ids_of_rows),
            items=items,
            items_on_host=(torch.cat([histories.items, wanted]).unique() if self.keeps_texts else items).numpy(),
            histories=dataclasses.replace(histories, items=history),
            target_places=target_places,
            targets=targets,
            labels=labels,
            label_mask=label_mask,
            group_mask=torch.from_numpy(self._group_mask(sample_ids)),
            negatives=negatives,
            negatives_log_q=negatives_log_q,
            query_texts=None if asked is None else asked.texts,
        )

    def _group_mask(self, sample_ids: Integers) -> NDArray[np.float32]:
        return np.zeros((len(sample_ids), 0), np.float32) if self.groups is None else self.groups.mask(sample_ids)

    def _column(self, rows: Rows, name: str, places: Integers) -> Tensor:
        """Gather a column; one that was not read is zeros."""
        return torch.from_numpy(rows.flat[name][places]) if name in rows.flat else torch.zeros(len(places))

    def _index_items(self, *indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """List the distinct items, padding first, and replace catalogue indices by positions in that list."""
        if self.takes_whole_catalogue:
            return torch.arange(self.manifest.num_items + 1), list(indices)
        items, positions = torch.unique(torch.cat([torch.tensor([PADDING_ITEM]), *indices]), return_inverse=True)
        return items, list(positions[1:].split([len(tensor) for tensor in indices]))
