"""The pretraining corpus: the catalogue's texts with masked tokens, and pairs of texts.

Every draw is a hash of the seed, the epoch and the item, so it does not depend on the rank or on the other items of a micro batch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Floats, Integers, Mask
from recsys.data.batch import map_tensors
from recsys.data.draws import stable_hash
from recsys.data.items import ItemFeatures, node_folder
from recsys.data.manifest import Dataset
from recsys.data.node_files import create_array, map_array, shared_entry
from recsys.data.text.cooccurrence import Cooccurrences
from recsys.errors import UserError
from recsys.schema import PADDING_ITEM

NO_TARGET = -100
"""Target of a token that is not predicted; cross-entropy ignores it."""

VALIDATION = 1 << 32
"""Used as the epoch in the draws of validation, so that these are always the same."""

_FORMAT = "v1"
_FEWEST_HELD_OUT = 64
_MOST_HELD_OUT = 4096


@dataclass(frozen=True)
class MaskedTokens:
    """Right-padded tokens (B, T), their lengths (B,), and the target at each place (B, T)."""

    tokens: Tensor
    lengths: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Pairs:
    """Items and a co-occurring partner of each. The first B rows of `tokens` and `lengths` are the items', the others the partners'."""

    items: Tensor  # (B,)
    partners: Tensor  # (B,) PADDING_ITEM if an item has none
    known: Tensor  # (B, K) all partners of an item, padded with PADDING_ITEM
    tokens: Tensor  # (2B, T)
    lengths: Tensor  # (2B,)


@dataclass(frozen=True)
class TextBatch:
    """One micro batch of items (B,), with a part for each objective. T is the length of the longest text."""

    sample_ids: Tensor
    masked: MaskedTokens | None
    pairs: Pairs | None

    def to(self, device: torch.device) -> "TextBatch":
        """Copy to a device."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def valid_counts(self) -> Tensor:
        """Return the number of tokens to predict and of pairs, for the parts that exist, in float64 for summing over ranks."""
        counts = [(self.masked.targets != NO_TARGET).sum()] if self.masked else []
        counts += [(self.pairs.partners != PADDING_ITEM).sum()] if self.pairs else []
        return torch.stack(counts).to(torch.float64)


@dataclass(frozen=True)
class TextSplit:
    """The items with text, ordered by a hash of their indices; the first ones are held out for validation."""

    held_out: Integers
    trained: NDArray[np.int32]

    @classmethod
    def read(cls, dataset: Dataset, catalogue: ItemFeatures, scratch: Path) -> "TextSplit":
        """Order the items, once per node; hold out a twentieth, or more of a small catalogue and less of a large one.

        Raises:
            UserError: there are fewer than 5 items with text.
        """

        def build(folder: Path) -> None:
            items = np.flatnonzero(catalogue.has_text.numpy())
            create_array(folder / "order.npy", (len(items),), np.int32)[:] = items[np.argsort(_hash(items))]

        with shared_entry(node_folder(scratch, dataset.manifest, f"texts-{_FORMAT}"), build) as entry:
            order = map_array(entry / "order.npy").numpy()
        num_held_out = min(max(len(order) // 20, min(_FEWEST_HELD_OUT, len(order) // 5)), _MOST_HELD_OUT)
        if not num_held_out:
            raise UserError(f"data.dataset = {dataset.uri}: has {len(order)} items with text; pretraining needs 5 or more")
        return cls(order[:num_held_out].astype(np.int64), order[num_held_out:])

    def is_held_out(self, items: Integers) -> Mask:
        """Return which items are held out; the result is arbitrary for items without text."""
        return np.asarray(_hash(items) <= _hash(self.held_out[-1:]))


@dataclass(frozen=True)
class TokenMasking:
    """Turns tokens into targets. Without a `mask_token`, every token except the first is predicted from those before it.

    Otherwise a share `fraction` of the tokens that are not `special` are targets. Of these, 8 in 10 are replaced by the mask token, 1 in 10
    by a random token, and 1 in 10 are kept (Devlin et al. 2019, section 3.1).
    """

    fraction: float
    mask_token: int | None
    special: tuple[int, ...]
    vocabulary: int

    def __call__(self, tokens: Integers, lengths: Integers, draws: Floats) -> MaskedTokens:
        """Mask tokens (B, T) according to draws (B, 3, T) in [0, 1)."""
        is_target = np.arange(tokens.shape[1]) < lengths[:, None]
        if self.mask_token is None:
            targets = np.roll(np.where(is_target, tokens, NO_TARGET), -1, axis=1)
            targets[:, -1] = NO_TARGET
        else:
            chosen, action, replacement = np.moveaxis(draws, 1, 0)
            is_target &= ~np.isin(tokens, self.special) & (chosen < self.fraction)
            targets = np.where(is_target, tokens, NO_TARGET)
            others = (replacement * self.vocabulary).astype(np.int64)
            tokens = np.where(is_target, np.select([action < 0.8, action < 0.9], [self.mask_token, others], tokens), tokens)
        return MaskedTokens(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(targets))


@dataclass(frozen=True)
class TextCollator:
    """Builds a `TextBatch` from items, with masked tokens if there is `masking`, with pairs if there are `partners`."""

    tokens: Tensor  # (I + 1, T)
    lengths: Tensor  # (I + 1,)
    split: TextSplit
    masking: TokenMasking | None
    partners: Cooccurrences | None
    seed: int

    def __call__(self, items: Integers, epoch: int) -> TextBatch:
        """Build a micro batch. Without items it holds the padding item, so that every rank runs every step."""
        items = items if len(items) else np.array([PADDING_ITEM])
        width = self.tokens.shape[1]
        draws = _hash(self.seed, epoch, items[:, None], np.arange(1 + 3 * width)) // 2**10 / 2.0**53
        masked = pairs = None
        if self.masking:
            tokens, lengths = self._texts(items)
            own = draws[:, 1:].reshape(-1, 3, width)[:, :, : tokens.shape[1]]
            masked = self.masking(tokens, lengths, own)
            masked.targets[torch.from_numpy(items == PADDING_ITEM)] = NO_TARGET
        if self.partners:
            pairs = self._pairs(self.partners, items, draws[:, :1], may_be_held_out=epoch == VALIDATION)
        return TextBatch(torch.from_numpy(items), masked, pairs)

    def _pairs(self, source: Cooccurrences, items: Integers, draws: Floats, may_be_held_out: bool) -> Pairs:
        """Draw a partner of each item in proportion to their co-occurrence; in training, held-out items are not drawn."""
        known, counts = source.of(items)
        ends = np.cumsum(counts if may_be_held_out else counts * ~self.split.is_held_out(known), axis=1)  # (B, K)
        has_partner = ends[:, -1] > 0
        places = (ends <= draws * ends[:, -1:]).sum(1) * has_partner
        partners = np.where(has_partner, np.take_along_axis(known, places[:, None], axis=1)[:, 0], PADDING_ITEM)
        tokens, lengths = self._texts(np.concatenate([items, partners]))
        return Pairs(*map(torch.from_numpy, (items, partners, known, tokens, lengths)))

    def _texts(self, items: Integers) -> tuple[Integers, Integers]:
        """Return tokens (B, T) and lengths (B,) of items; T is the longest length."""
        lengths = self.lengths[items].numpy().astype(np.int64)
        return self.tokens[items, : lengths.max()].numpy().astype(np.int64), lengths


def _hash(*parts: int | Integers) -> Integers:
    """Hash numbers, broadcast against each other, to the range 0 to 2^63 - 1."""
    value = torch.zeros(1, dtype=torch.int64)
    for part in parts:
        value = stable_hash(value ^ torch.as_tensor(part), seed=0)
    return value.numpy()
