"""Queries typed by users or made from item texts, and the draw of samples that get one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from recsys.arrays import Integers, Mask
from recsys.data.draws import sample_draws, stable_hash
from recsys.data.items import node_folder
from recsys.data.manifest import Dataset
from recsys.data.node_files import Strings, map_table, shared_entry, write_table
from recsys.data.sequences import Sequences
from recsys.schema import QUERIES_SCHEMA, QUERY

_FORMAT = "v1"

NUM_VARIANTS = 4
"""Number of queries made from each item's text for training."""

EVALUATION_VARIANT = NUM_VARIANTS
"""The variant that evaluation uses: made as in training, with draws that training never uses."""

MAX_WORDS = 8
FIRST_WORDS = 32
"""A query takes words from the beginning of a text, since the language model reads no further."""

NO_HISTORY_RATE = 0.1
"""Share of queries without a history, as for an unknown user."""


def drop_words(text: str, item: int, variant: int) -> str:
    """Return 1 to `MAX_WORDS` words of a text, in order; the draws depend only on the item's index and the variant."""
    words = text.split()[:FIRST_WORDS]
    if not words:
        return ""
    draws = stable_hash(stable_hash(torch.tensor(item), variant) + torch.arange(len(words) + 1), 0).numpy()
    num_kept = 1 + int(draws[0]) % min(len(words), MAX_WORDS)
    return " ".join(words[place] for place in sorted(np.argsort(draws[1:])[:num_kept].tolist()))


def read_queries(dataset: Dataset, scratch: Path) -> Sequence[str]:
    """Load the typed queries, in order from query index 1, from a file below `scratch` that the processes of a node share."""
    if not dataset.manifest.num_queries:
        return ()

    def build(folder: Path) -> None:
        write_table(folder / "queries.arrow", QUERIES_SCHEMA, (dataset.read_shard(shard) for shard in dataset.manifest.query_shards))

    with shared_entry(node_folder(scratch, dataset.manifest, f"queries-{_FORMAT}"), build) as folder:
        return Strings(map_table(folder / "queries.arrow")[QUERY])


class QueryTexts(Sequence[str]):
    """All queries of training: row v x (I + 1) + i is variant v of item i's text, made on access; the `typed` queries follow."""

    def __init__(self, texts: Sequence[str], typed: Sequence[str] = ()) -> None:
        self._texts, self._typed = texts, typed

    def __len__(self) -> int:
        return NUM_VARIANTS * len(self._texts) + len(self._typed)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        place = range(len(self))[row]
        if place >= NUM_VARIANTS * len(self._texts):
            return self._typed[place - NUM_VARIANTS * len(self._texts)]
        variant, item = divmod(place, len(self._texts))
        return drop_words(self._texts[item], item, variant)


@dataclass(frozen=True)
class QueryTargets:
    """The Q targets of a micro batch that are also predicted with a query.

    Queries after the whole history of their sample come first. The other E queries follow a part of the history or no history; each gets
    its own history.
    """

    samples: Integers  # (Q,) row of each target's sample
    targets: Integers  # (Q,) place of each target in its sample
    texts: Integers  # (Q,) rows of `QueryTexts`
    cut_lengths: Integers  # (E,) lengths of the other histories

    @property
    def num_whole(self) -> int:
        """Number of queries that follow a whole history."""
        return len(self.samples) - len(self.cut_lengths)

    def histories(self, of_samples: Sequences) -> tuple[Sequences, Mask]:
        """Append the E other histories to those of the samples; return all, and which of them a query follows."""
        rows = np.append(np.arange(len(of_samples)), self.samples[self.num_whole :])
        has_query = np.arange(len(rows)) >= len(of_samples)
        has_query[self.samples[: self.num_whole]] = True
        return of_samples[rows].within(0, np.append(of_samples.lengths, self.cut_lengths)), has_query


@dataclass(frozen=True)
class QueryDraws:
    """Draws the samples that get a query by their ids and the epoch, so the draw is the same for any number of ranks.

    If typed queries led to targets of a sample, one of these targets is predicted with its query. Otherwise the last target, if it has
    text, is predicted with words of that text.
    """

    rate: float
    seed: int
    has_text: Tensor  # (I + 1,) bool
    target_kinds: Mask | None = None  # the event kinds that are targets; without it, all are
    cuts_all: bool = False  # no query follows the history of its sample, since that ends with the last target

    def __call__(self, samples: Sequences, epoch: int) -> QueryTargets:
        """Choose samples, and one target of each."""
        has_any = samples.lengths > samples.scalars["first_target"]
        samples_with = np.flatnonzero(has_any)
        if len(samples_with) < len(samples):
            asked = self(samples[samples_with], epoch) if len(samples_with) else QueryTargets(*(np.zeros(0, np.int64) for _ in range(4)))
            return replace(asked, samples=samples_with[asked.samples])
        last = samples.lengths - 1
        items = samples.columns["items"][samples.starts + last].astype(np.int64)
        draws = sample_draws(torch.from_numpy(samples.scalars["sample_id"]), self.seed, epoch)
        chance, alone, choice = (stable_hash(draws, number).numpy() for number in range(3))
        is_target = self._is_target(samples)
        targets, typed = last, np.zeros(len(samples), np.int64)
        if "queries" in samples.columns:
            targets, typed = _draw_typed(samples, is_target, choice)
        has_text = self.has_text[items].numpy() & is_target[samples.starts + last]
        chosen = np.flatnonzero((chance < self.rate * 2.0**63) & ((typed > 0) | has_text))
        has_no_history = alone[chosen] < NO_HISTORY_RATE * 2.0**63
        is_own = has_no_history | (targets[chosen] < last[chosen]) | self.cuts_all
        order = np.argsort(is_own, kind="stable")
        chosen, num_own = chosen[order], int(is_own.sum())
        made = choice[chosen] % NUM_VARIANTS * len(self.has_text) + items[chosen]
        texts = np.where(typed[chosen] > 0, NUM_VARIANTS * len(self.has_text) + typed[chosen] - 1, made)
        cut_lengths = np.where(has_no_history[order], 0, targets[chosen])[len(chosen) - num_own :]
        return QueryTargets(chosen, targets[chosen], texts, cut_lengths)

    def _is_target(self, samples: Sequences) -> Mask:
        """Return for each interaction of the columns whether its kind is a target."""
        if self.target_kinds is None or "events" not in samples.columns:
            return np.ones(len(samples.columns["items"]), bool)
        return self.target_kinds[samples.columns["events"]]


def _draw_typed(samples: Sequences, is_target: Mask, draws: Integers) -> tuple[Integers, Integers]:
    """Draw one target with a typed query per row; return places and queries, or the last place and 0 if a row has none."""
    first = samples.scalars["first_target"]
    candidates = samples.within(first, samples.lengths)
    queries = candidates.flat("queries").astype(np.int64)
    is_typed = (queries > 0) & is_target[candidates.places]
    owners, queries = candidates.owners[is_typed], queries[is_typed]
    places = candidates.positions[is_typed] + first[owners]
    counts = np.bincount(owners, minlength=len(samples))
    targets, typed = samples.lengths - 1, np.zeros(len(samples), np.int64)
    has_some = counts > 0
    picked = (np.cumsum(counts) - counts + draws % np.maximum(counts, 1))[has_some]
    targets[has_some], typed[has_some] = places[picked], queries[picked]
    return targets, typed
