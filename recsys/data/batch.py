"""What a rank trains on in one micro batch, and how rows become one."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.data.manifest import DatasetManifest
from recsys.data.rows import Rows, gap_buckets
from recsys.schema import PADDING_ITEM


@dataclass(frozen=True)
class Batch:
    """One micro batch. Shapes: B samples, L positions, D distinct items, T tasks, K negatives.

    `history`, `targets` and `negatives` are positions in `items`; `items` are catalogue indices, and `items[0]` is
    padding. Histories are aligned left: position 0 is the oldest.
    """

    sample_ids: Tensor  # (B,)
    items: Tensor  # (D,)
    history: Tensor  # (B, L)
    events: Tensor  # (B, L) event kind of each history item, from 1; 0 is padding
    gaps: Tensor  # (B, L) bucket of the time since the item before
    targets: Tensor  # (B, L) the item after each position, 0 where that is no target
    labels: Tensor  # (B, L, T) of the target
    label_mask: Tensor  # (B, L, T) 1 where there is a label
    negatives: Tensor  # (K,) empty where the loss takes the whole catalogue
    negatives_log_q: Tensor  # (K,) log probability that one draw gives this item

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting where the memory is pinned."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in dataclasses.fields(self)})

    def pin(self) -> "Batch":
        """Move to page-locked memory, from which a GPU copies in the background."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in dataclasses.fields(self)})

    def valid_counts(self) -> Tensor:
        """Count retrieval targets, then labels by task, (1 + T,), in float64 since they are summed over ranks."""
        counts = torch.cat([(self.targets != 0).sum()[None], self.label_mask.sum((0, 1))])
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


@dataclass(frozen=True)
class Collator:
    """Turns rows of the training shards into a `Batch`."""

    manifest: DatasetManifest
    takes_whole_catalogue: bool

    def __call__(self, rows: Rows, negatives: Tensor, negatives_log_q: Tensor) -> Batch:
        """Build a micro batch; no rows give one row of padding, so that every rank runs every step. A column not read is zeros."""
        if len(rows) == 0:
            rows = Rows(np.array([-1]), np.array([2], np.int32), np.array([0]), np.array([2]), {"items": np.zeros(2, np.int32)})
        columns, is_real = rows.pad()
        zeros = np.zeros(is_real.shape, np.int64)
        mask, sequence = torch.from_numpy(is_real), torch.from_numpy(columns["items"])
        events, values = (torch.from_numpy(columns.get(name, zeros)) for name in ("events", "values"))
        timestamps = columns.get("timestamps", zeros)
        gaps = torch.from_numpy(gap_buckets(np.diff(timestamps, axis=1, prepend=timestamps[:, :1])))
        first_target = torch.tensor(rows.first_target)
        is_target = mask[:, 1:] & (torch.arange(1, mask.shape[1]) >= first_target[:, None])  # (B, L)
        labels, label_mask = task_labels(self.manifest, events[:, 1:], values[:, 1:])
        is_input = mask[:, 1:]  # an interaction with one after it
        history = torch.where(is_input, sequence[:, :-1], PADDING_ITEM).long()
        targets = torch.where(is_target, sequence[:, 1:], PADDING_ITEM).long()
        items, (history, targets, negatives) = self._index_items(history, targets, negatives)
        return Batch(
            sample_ids=torch.tensor(rows.sample_ids),
            items=items,
            history=history,
            events=torch.where(is_input, events[:, :-1].long() + 1, 0),
            gaps=torch.where(is_input, gaps[:, :-1], 0).long(),
            targets=targets,
            labels=labels,
            label_mask=label_mask * is_target[..., None],
            negatives=negatives,
            negatives_log_q=negatives_log_q,
        )

    def _index_items(self, *indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """List the distinct items, padding first, and replace catalogue indices by positions in that list."""
        if self.takes_whole_catalogue:
            return torch.arange(self.manifest.num_items + 1), list(indices)
        flat = torch.cat([torch.zeros(1, dtype=torch.long), *(tensor.flatten() for tensor in indices)])
        items, positions = torch.unique(flat, return_inverse=True)
        parts = positions[1:].split([tensor.numel() for tensor in indices])
        return items, [part.view(tensor.shape) for part, tensor in zip(parts, indices, strict=True)]
