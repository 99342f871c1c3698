"""Who asks and when: the profile that a history begins with, and the context that a user state is joined with.

Shapes: B users, N states, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.batch import PackedProfiles
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace

MISSING_RATE = 0.1
"""Share of the values that training takes for missing, so that the model learns to do without each of them."""


class ProfileEncoder(nn.Module):
    """Encodes profiles (B, W): the mean of the embeddings of a user's categories, plus a projection of the numbers and of which exist."""

    missing: Tensor  # (V + 1,) the entry `column=` of each category's column

    def __init__(self, space: ProfileSpace, width: int) -> None:
        super().__init__()
        self.num_numbers = len(space.moments)
        self.categories = nn.EmbeddingBag(len(space.vocabulary) + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.categories.weight, std=width**-0.5)
        self.register_buffer("missing", torch.tensor(space.missing), persistent=False)
        self.numbers = nn.Linear(2 * self.num_numbers, width) if self.num_numbers else None

    def forward(self, profiles: PackedProfiles | None, num_users: int) -> Tensor:
        """Return the profiles of users (B, W); without any, the result only keeps the parameters in the graph, as ZeRO needs."""
        if profiles is None:
            device = self.categories.weight.device
            categories, numbers = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(num_users, self.num_numbers, device=device)
            profiles = PackedProfiles(categories, torch.zeros(num_users, dtype=torch.long, device=device), numbers)
        # A category that a later version of the dataset has is unknown to an older model.
        known = profiles.categories * (profiles.categories < self.categories.num_embeddings)
        if self.training:
            known = torch.where(_is_dropped(known), self.missing[known], known)
        encoded: Tensor = self.categories(known, profiles.offsets)
        if self.numbers is not None:
            is_known = ~profiles.numbers.isnan()
            if self.training:
                is_known = is_known & ~_is_dropped(is_known)
            read = torch.cat([profiles.numbers.where(is_known, 0.0), is_known.to(profiles.numbers)], 1)
            encoded = encoded + self.numbers(read.to(encoded.dtype))
        return encoded


class ContextFusion(nn.Module):
    """Joins user states u with contexts c: u + D silu(A [u, c]). D starts at 0, so that training begins without contexts.

    c is the sum of an embedding per field; unknown values have an embedding, too.
    """

    def __init__(self, space: ContextSpace, width: int) -> None:
        super().__init__()
        self.space = space
        self.values = nn.Embedding(len(space.names), width)
        nn.init.normal_(self.values.weight, std=width**-0.5)
        self.up, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, contexts: Tensor) -> Tensor:
        """Return the joined states (N, W) of states (N, W) and contexts (N,)."""
        rows = torch.stack(list(self.space.rows(contexts)))  # (fields, N)
        if self.training:
            unknown = torch.stack(list(self.space.rows(torch.zeros_like(contexts))))
            rows = torch.where(_is_dropped(rows), unknown, rows)
        context = self.values(rows).sum(0).to(states.dtype)
        joined: Tensor = states + self.down(F.silu(self.up(torch.cat([states, context], -1))))
        return joined


def _is_dropped(values: Tensor) -> Tensor:
    """Draw which values count as missing."""
    return torch.rand(values.shape, device=values.device) < MISSING_RATE
