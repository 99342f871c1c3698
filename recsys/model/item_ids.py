"""An id's own vector: a row per item, or a few rows shared with others for catalogues too large for that."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.hashing import stable_hash


class IdTable(nn.Module):
    """A row per item. Shapes: I items, D items asked for, W width."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_items + 1, width) * width**-0.5)  # (I + 1, W)

    def forward(self, items: Tensor | None, present: Tensor) -> Tensor:
        """Return vectors (D, W), zero where not present (D,); without `items` those of the whole catalogue, and gather nothing."""
        rows = self.weight if items is None else F.embedding(items, self.weight)
        return rows * present.unsqueeze(1).to(rows.dtype)


class HashedIds(nn.Module):
    """The sum of H rows of one table of B, picked and signed by independent hashes of the catalogue index.

    The signs (Weinberger et al. 2009) make what other items left in a shared row cancel on average. Of I items each shares a row with
    about H I / B others, but all rows and signs with none to speak of: about I^2 H! / 2 (2 B)^H pairs of items have the same vector.
    With 100 M items, H = 2 and B = 10 M rows: 25 pairs.
    """

    def __init__(self, num_items: int, num_buckets: int, num_hashes: int, width: int) -> None:
        super().__init__()
        self.num_items, self.num_hashes = num_items, num_hashes
        self.weight = nn.Parameter(torch.randn(num_buckets, width) * (num_hashes * width) ** -0.5)  # (B, W)

    def forward(self, items: Tensor | None, present: Tensor) -> Tensor:
        """Return vectors as `IdTable` does."""
        if items is None:
            items = torch.arange(self.num_items + 1, device=present.device)
        rows, signs = self.pick(items)
        weights = (signs * present.unsqueeze(1)).to(self.weight.dtype)
        return F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=weights)

    def pick(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of items (D,) and their signs, both (D, H)."""
        hashes = torch.stack([stable_hash(items, seed) for seed in range(self.num_hashes)], 1)
        return (hashes >> 1) % len(self.weight), 1 - 2 * (hashes & 1)
