"""The micro batch, and how it is built from samples: packed histories with little padding, targets and labels."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Integers, Mask
from recsys.config.model import ModelConfig
from recsys.data.draws import AloneDraws, sample_draws, stable_hash
from recsys.data.labels.tasks import exposure_labels, task_labels
from recsys.data.labels.training import UserGroups, keep_negatives
from recsys.data.manifest import DatasetManifest
from recsys.data.sequences import Sequences, cut_windows, ranges
from recsys.data.text.queries import QueryDraws
from recsys.schema import CONTEXTS, EXPOSURE_COLUMNS, PADDING_ITEM

Groups = tuple[tuple[int, int], ...]
"""(number of histories, places per history) of each group, in order."""

CPU_GROUP_COST = 32
GPU_GROUP_COST = 4096
"""Cost of one more group, in padded places: attention runs once per group, which is most expensive on a GPU."""


@dataclass(frozen=True)
class PackedProfiles:
    """The profiles of B users, with C categories in total and F numbers each."""

    categories: Tensor  # (C,) from 1
    offsets: Tensor  # (B,) where each user's categories begin
    numbers: Tensor  # (B, F) NaN if missing


@dataclass(frozen=True)
class PackedHistories:
    """B histories packed into P places, oldest interaction first. Histories of similar length share a group, padded to its longest one."""

    items: Tensor  # (P,) 0 is padding
    events: Tensor  # (P,) event kind, from 1; 0 is padding
    times: Tensor  # (P,) seconds
    values: Tensor  # (P,) NaN where there is none
    groups: Groups
    query_places: Tensor | None = None  # (Q,) places of queries, each the last of its history; there only `times` is set
    start_places: Tensor | None = None  # (B,) the place before each history's first interaction, if there is one; likewise
    profiles: PackedProfiles | None = None


Record = TypeVar("Record")


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return a copy of a dataclass with `change` applied to every tensor in it, including those in nested dataclasses."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else map_tensors(value, change) if is_dataclass(value) else value

    return type(record)(**{field.name: changed(getattr(record, field.name)) for field in fields(record)})  # type: ignore[arg-type]


def group_lengths(lengths: Integers, group_cost: int) -> tuple[Integers, Groups]:
    """Choose the groups that minimize padded places plus `group_cost` per group (dynamic programming over the lengths).

    Args:
        lengths: (B,) at least 1 each.

    Returns:
        The first place of each history (B,), and the groups.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    up_to = np.concatenate([[0], np.cumsum(counts)])  # number of histories up to each length
    cost, first = np.zeros(len(distinct) + 1), np.zeros(len(distinct) + 1, np.int64)
    for last in range(1, len(cost)):
        costs = cost[:last] + (up_to[last] - up_to[:last]) * distinct[last - 1] + group_cost
        first[last] = np.argmin(costs)
        cost[last] = costs[first[last]]
    groups: list[tuple[int, int]] = []
    last = len(distinct)
    while last:
        groups.append((int(up_to[last] - up_to[first[last]]), int(distinct[last - 1])))
        last = int(first[last])
    groups.reverse()
    widths = np.repeat([length for _, length in groups], [number for number, _ in groups])
    starts = np.empty(len(lengths), np.int64)
    starts[np.argsort(lengths, kind="stable")] = np.cumsum(widths) - widths
    return starts, tuple(groups)


def pack(histories: Sequences, group_cost: int, has_query: Mask | None = None, has_start: bool = False) -> tuple[PackedHistories, Integers]:
    """Pack histories of `items` and, if present, `events`, `timestamps` and `values`; a history may be empty.

    Args:
        has_query: (B,) which histories get one more place for a query; its time is that of the last interaction.
        has_start: whether all get one more place before the first interaction; its time is that of the first interaction.

    Returns:
        The packed histories, and the place of each one's first interaction (B,).
    """
    columns, lengths, source = histories.columns, histories.lengths, histories.places
    num_places_each = lengths + has_start + (0 if has_query is None else has_query)
    start_places, groups = group_lengths(np.maximum(num_places_each, 1), group_cost)
    first_places = start_places + has_start
    places = ranges(first_places, lengths)
    num_places = sum(number * length for number, length in groups)

    def lay_out(name: str, empty: float, dtype: type) -> NDArray[Any]:
        laid_out: NDArray[Any] = np.full(num_places, empty, dtype)
        if name in columns:
            laid_out[places] = columns[name][source]
        return laid_out

    events = np.zeros(num_places, np.int64)
    events[places] = columns["events"][source].astype(np.int64) + 1 if "events" in columns else 1
    times, query_places = lay_out("timestamps", 0, np.int64), None
    if has_query is not None:
        query_places = (first_places + lengths)[has_query]
        times[query_places] = times[query_places - (lengths[has_query] > 0)]
    if has_start:
        times[start_places] = times[first_places.clip(max=num_places - 1)] * (lengths > 0)
    packed = PackedHistories(
        items=torch.from_numpy(lay_out("items", PADDING_ITEM, np.int64)),
        events=torch.from_numpy(events),
        times=torch.from_numpy(times),
        values=torch.from_numpy(lay_out("values", np.nan, np.float32)),
        groups=groups,
        query_places=None if query_places is None else torch.from_numpy(query_places),
        start_places=torch.from_numpy(start_places) if has_start else None,
        profiles=_pack_profiles(histories.profiles) if has_start and histories.profiles is not None else None,
    )
    return packed, first_places


def _pack_profiles(profiles: Sequences) -> PackedProfiles:
    categories, offsets = profiles.flat("categories").astype(np.int64), np.cumsum(profiles.lengths) - profiles.lengths
    return PackedProfiles(*map(torch.from_numpy, (categories, offsets, np.ascontiguousarray(profiles.scalars["numbers"], np.float32))))


def has_profiles(config: ModelConfig, manifest: DatasetManifest) -> bool:
    """Return whether the model reads profiles."""
    return config.use_profiles and bool(manifest.profiles)


def has_start(config: ModelConfig, manifest: DatasetManifest) -> bool:
    """Return whether a history begins with a place before its first interaction: for its user's profile, or what was shown before it."""
    return manifest.has_exposures or has_profiles(config, manifest)


def group_cost(is_gpu: bool) -> int:
    """Return the cost of one more group, in padded places, on a GPU or a CPU."""
    return GPU_GROUP_COST if is_gpu else CPU_GROUP_COST


@dataclass(frozen=True)
class Batch:
    """One micro batch. Shapes: B samples, P places of their histories, N targets, E exposures, D distinct items, T tasks, G groups.

    `histories.items`, `targets`, `exposures` and `negatives` are positions in `items`; `items` are catalogue indices, and `items[0]` is
    padding. The last Q of the N targets belong to queries; before them are targets that are predicted from the profile alone.
    """

    sample_ids: Tensor  # (B,)
    items: Tensor  # (D,)
    items_on_host: Integers  # (D,) `items` on the CPU; with cached text embeddings only the items of histories and targets
    histories: PackedHistories
    target_places: Tensor  # (N,) the place before each target
    targets: Tensor  # (N,)
    target_weights: Tensor  # (N,) in the retrieval loss
    exposure_places: Tensor  # (E,) the place before each exposure
    exposures: Tensor  # (E,)
    displays: Tensor  # (E,) position of display, from 1; 0: unknown
    contexts: Tensor  # (N + E,) of the targets, then of the exposures; 0: unknown
    labels: Tensor  # (N + E, T) of the targets, then of the exposures
    label_mask: Tensor  # (N + E, T) 1 if there is a label
    group_mask: Tensor  # (N, G) 1 if the target's user is in the group; G is 0 without `fairness.attribute`
    negatives: Tensor  # (K,) empty if the loss draws none
    negatives_log_q: Tensor  # (K,) log probability that one draw gives this item
    query_texts: Integers | None = None  # (Q,) rows of `QueryTexts`, on the CPU; None without queries

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, asynchronously if the memory is pinned."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU copies asynchronously."""
        return map_tensors(self, Tensor.pin_memory)

    def valid_counts(self) -> Tensor:
        """Return the counts of targets, labels per task and targets per group (1 + T + G,), in float64 for summing over ranks."""
        counts = torch.cat([self.label_mask.new_tensor([len(self.targets)]), self.label_mask.sum(0), self.group_mask.sum(0)])
        return counts.to(torch.float64)


PADDING_SAMPLE = Sequences.of_offsets(
    {"items": np.zeros(1, np.int32)}, np.array([0, 1]), sample_id=np.array([-1]), first_target=np.array([1])
)
"""The sample of a rank that has none in a step: one place of padding without a target."""


NO_EXPOSURES = Sequences.of_offsets(
    {name.removeprefix("exposed_"): np.zeros(0, np.int32) for name in EXPOSURE_COLUMNS}, np.zeros(2, np.int64)
)
"""One row without exposures."""

FIRST_EXPOSURE = 1 << 32
"""Exposures of a sample are numbered from here on where negative labels are drawn."""


def shuffle_histories(samples: Sequences, seed: int, epoch: int) -> Sequences:
    """Shuffle the interactions of each row; the order depends only on the sample, the seed and the epoch."""
    samples = samples.compact()
    owners = samples.owners
    draws = sample_draws(torch.from_numpy(samples.scalars["sample_id"]), seed, epoch)[owners]
    keys = stable_hash(draws + torch.from_numpy(samples.positions), 3)  # seeds 0 to 2 draw the queries
    order = np.lexsort((keys.numpy(), owners))
    return replace(samples, columns={name: column[order] for name, column in samples.columns.items()})


def cut_histories(samples: Sequences, max_history: int, stride: int) -> Sequences:
    """Cut samples of more than `max_history` + 1 interactions into pieces; every target remains a target exactly once."""
    is_long = samples.lengths > max_history + 1
    return cut_windows(samples, max_history, np.where(is_long, stride, samples.lengths.clip(min=1))) if is_long.any() else samples


@dataclass(frozen=True)
class Collator:
    """Builds a `Batch` from training samples; with a `shuffle_seed`, histories are reshuffled in every epoch.

    Samples of more than `max_history` + 1 interactions are cut into pieces that are `stride` targets apart.
    """

    manifest: DatasetManifest
    takes_whole_catalogue: bool
    group_cost: int = CPU_GROUP_COST
    groups: UserGroups | None = None
    negative_rates: Tensor | None = None  # (T,) the share of negative labels that is kept
    queries: QueryDraws | None = None
    shuffle_seed: int | None = None
    caches_texts: bool = False
    max_history: int | None = None
    stride: int | None = None
    alone: AloneDraws | None = None  # for a model that reads profiles

    def __call__(self, samples: Sequences, negatives: Tensor, negatives_log_q: Tensor, epoch: int = 0) -> Batch:
        """Build a micro batch. Without samples it is one place of padding, so that every rank runs every step."""
        if len(samples) == 0:
            samples = PADDING_SAMPLE
        elif self.shuffle_seed is not None:
            samples = shuffle_histories(samples, self.shuffle_seed, epoch)
        sample_ids_before = samples.scalars["sample_id"]
        if self.max_history is not None:
            samples = cut_histories(samples, self.max_history, self.stride or self.max_history)
        # Exposures may follow the last interaction, which otherwise is only a target.
        histories = samples if self.manifest.has_exposures else samples.within(0, samples.lengths - 1)
        owners, after = self._targets(samples)
        asked = None if self.queries is None else self.queries(samples, epoch)
        histories, has_query = (histories, None) if asked is None else asked.histories(histories)
        packed, first_places = pack(histories, self.group_cost, has_query, self.manifest.has_exposures or self.alone is not None)
        target_places = torch.from_numpy(first_places[owners] + after - 1)
        if self.alone is not None and packed.start_places is not None:
            drawn = self.alone(samples.scalars["sample_id"], owners, epoch)
            target_places = torch.cat([target_places, packed.start_places[owners[drawn]]])
            owners, after = np.append(owners, owners[drawn]), np.append(after, after[drawn])
        if asked is not None and packed.query_places is not None:
            owners, after = np.append(owners, asked.samples), np.append(after, asked.targets)
            target_places = torch.cat([target_places, packed.query_places])
        sample_ids, places = samples.scalars["sample_id"][owners], samples.starts[owners] + after
        events = _column(samples, "events", places)
        of_targets = task_labels(self.manifest, events, _column(samples, "values", places))
        shown = NO_EXPOSURES[np.zeros(len(samples), np.int64)] if samples.exposures is None else samples.exposures
        of_exposures = exposure_labels(self.manifest, shown.flat("labels"), shown.flat("known"))
        labels, label_mask = (torch.from_numpy(np.concatenate(pair)) for pair in zip(of_targets, of_exposures, strict=True))
        if self.negative_rates is not None:
            owner_ids = torch.from_numpy(np.append(sample_ids, samples.scalars["sample_id"][shown.owners]))
            numbers = torch.from_numpy(np.append(after, FIRST_EXPOSURE + shown.positions))
            label_mask = label_mask * keep_negatives(labels, owner_ids, numbers, self.negative_rates)
        wanted = torch.from_numpy(_column(samples, "items", places)).long()
        exposed = torch.from_numpy(shown.flat("items").astype(np.int64))
        items, (history, targets, exposures, negatives) = self._index_items(packed.items, wanted, exposed, negatives)
        return Batch(
            sample_ids=torch.tensor(sample_ids_before),
            items=items,
            items_on_host=(torch.cat([packed.items, wanted, exposed]).unique() if self.caches_texts else items).numpy(),
            histories=replace(packed, items=history),
            target_places=target_places,
            targets=targets,
            target_weights=self._weights(events),
            exposure_places=torch.from_numpy(first_places[shown.owners] + shown.flat("places") - 1),
            exposures=exposures,
            displays=torch.from_numpy(shown.flat("displays").astype(np.int64)),
            contexts=torch.from_numpy(np.append(self._contexts(samples, places, target_places, packed), shown.flat("contexts"))),
            labels=labels,
            label_mask=label_mask,
            group_mask=torch.from_numpy(self._group_mask(sample_ids)),
            negatives=negatives,
            negatives_log_q=negatives_log_q,
            query_texts=None if asked is None else asked.texts,
        )

    def _targets(self, samples: Sequences) -> tuple[Integers, Integers]:
        """Return the row and the place in the row of each target: the interactions of positive kinds from `first_target` on."""
        first = samples.scalars["first_target"]
        num_later = samples.lengths - first
        owners, places = np.repeat(np.arange(len(samples)), num_later), ranges(first, num_later)
        is_target = self.manifest.target_kinds
        if is_target.all() or "events" not in samples.columns:
            return owners, places
        is_kept = is_target[samples.columns["events"][samples.starts[owners] + places]]
        return owners[is_kept], places[is_kept]

    def _contexts(self, samples: Sequences, places: Integers, target_places: Tensor, packed: PackedHistories) -> Integers:
        """Return the contexts of targets (N,); those predicted from the profile alone have no interaction before."""
        codes = _column(samples, CONTEXTS, places).astype(np.int64)
        if self.alone is None or packed.start_places is None or not self.manifest.contexts:
            return codes
        is_alone = torch.isin(target_places, packed.start_places).numpy()
        return np.where(is_alone, self.manifest.contexts.without_history(codes), codes)

    def _weights(self, events: NDArray[Any]) -> Tensor:
        """Return the weights of targets in the retrieval loss (N,), by their kinds."""
        kinds = self.manifest.kind_table
        weights = np.array([kind.weight for kind in kinds], np.float32)
        return torch.from_numpy(weights[events.astype(np.int64)] if len(kinds) > 1 else np.full(len(events), weights[0]))

    def _group_mask(self, sample_ids: Integers) -> NDArray[np.float32]:
        return np.zeros((len(sample_ids), 0), np.float32) if self.groups is None else self.groups.mask(sample_ids)

    def _index_items(self, *indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the distinct items, padding first, and the catalogue indices as positions among them."""
        if self.takes_whole_catalogue:
            return torch.arange(self.manifest.num_items + 1), list(indices)
        items, positions = torch.unique(torch.cat([torch.tensor([PADDING_ITEM]), *indices]), return_inverse=True)
        return items, list(positions[1:].split([len(tensor) for tensor in indices]))


def _column(samples: Sequences, name: str, places: Integers) -> NDArray[Any]:
    """Gather a column, or zeros if the column was not read."""
    return samples.columns[name][places] if name in samples.columns else np.zeros(len(places), np.float32)
