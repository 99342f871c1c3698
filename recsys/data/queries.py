"""Queries made of items' texts by dropping words, and which training samples are asked with one; encoding them is the model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.hashing import sample_draws, stable_hash
from recsys.data.rows import Integers, Rows

NUM_VARIANTS = 4
"""So many queries are made of each item's text for training."""

EVALUATION_VARIANT = NUM_VARIANTS
"""What an evaluation asks is made as in training, and by draws that training never makes."""

MAX_WORDS = 8
FIRST_WORDS = 32
"""A query has words of a text's beginning alone, since the language model reads no more of it."""

ALONE_RATE = 0.1
"""In so many of the cases there is no history before the query, as of a user of whom nothing else is known."""


def drop_words(text: str, item: int, variant: int) -> str:
    """Keep 1 to `MAX_WORDS` words of a text, in their order; the draws depend on the item's index and the variant alone."""
    words = text.split()[:FIRST_WORDS]
    if not words:
        return ""
    draws = stable_hash(stable_hash(torch.tensor(item), variant) + torch.arange(len(words) + 1), 0).numpy()
    num_kept = 1 + int(draws[0]) % min(len(words), MAX_WORDS)
    return " ".join(words[place] for place in sorted(np.argsort(draws[1:])[:num_kept].tolist()))


class QueryTexts(Sequence[str]):
    """All queries that training asks, each made when it is asked for; row v x (I + 1) + i is variant v of item i's text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return NUM_VARIANTS * len(self._texts)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        variant, item = divmod(range(len(self))[row], len(self._texts))
        return drop_words(self._texts[item], item, variant)


@dataclass(frozen=True)
class Asked:
    """The Q samples of a micro batch whose last target is predicted with a query too; the last `num_alone` without their history."""

    samples: Integers  # (Q,) places among the rows
    texts: Integers  # (Q,) rows of `QueryTexts`
    num_alone: int

    def has_query(self, num_samples: int) -> NDArray[np.bool_]:
        """Tell of each history, and then of `num_alone` empty ones, whether a query follows it."""
        has_query = np.zeros(num_samples + self.num_alone, np.bool_)
        has_query[self.samples[: len(self.samples) - self.num_alone]] = True
        has_query[num_samples:] = True
        return has_query


@dataclass(frozen=True)
class QueryDraws:
    """Draws the samples that are asked with a query by their ids and the epoch, so that it is the same on any number of ranks."""

    rate: float
    seed: int
    has_text: Tensor  # (I + 1,) bool

    def __call__(self, rows: Rows, epoch: int) -> Asked:
        """Choose samples whose last target has text."""
        items = rows.flat["items"][rows.starts + rows.lengths - 1].astype(np.int64)
        draws = sample_draws(torch.from_numpy(rows.sample_ids), self.seed, epoch)
        chance, alone, variant = (stable_hash(draws, number).numpy() for number in range(3))
        chosen = np.flatnonzero((chance < self.rate * 2.0**63) & self.has_text[items].numpy())
        is_alone = alone[chosen] < ALONE_RATE * 2.0**63
        chosen = chosen[np.argsort(is_alone, kind="stable")]
        texts = variant[chosen] % NUM_VARIANTS * len(self.has_text) + items[chosen]
        return Asked(chosen, texts, int(is_alone.sum()))
