"""Who asks and when: the profile that a history begins with, and the context that a user state is joined with.

Shapes: B users, N states, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.batch import PackedProfiles
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace


class ProfileEncoder(nn.Module):
    """Encodes profiles (B, W): the mean of the embeddings of a user's categories, plus a projection of the numbers and of which exist."""

    def __init__(self, space: ProfileSpace, width: int) -> None:
        super().__init__()
        self.num_numbers = len(space.moments)
        self.categories = nn.EmbeddingBag(len(space.vocabulary) + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.categories.weight, std=width**-0.5)
        self.numbers = nn.Linear(2 * self.num_numbers, width) if self.num_numbers else None

    def forward(self, profiles: PackedProfiles | None, num_users: int) -> Tensor:
        """Return the profiles of users (B, W); without any, the result only keeps the parameters in the graph, as ZeRO needs."""
        if profiles is None:
            device = self.categories.weight.device
            categories, numbers = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(num_users, self.num_numbers, device=device)
            profiles = PackedProfiles(categories, torch.zeros(num_users, dtype=torch.long, device=device), numbers)
        # A category that a later version of the dataset has is unknown to an older model.
        known = profiles.categories * (profiles.categories < self.categories.num_embeddings)
        encoded: Tensor = self.categories(known, profiles.offsets)
        if self.numbers is not None:
            is_known = ~profiles.numbers.isnan()
            read = torch.cat([profiles.numbers.nan_to_num(), is_known.to(profiles.numbers)], 1)
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
        context = self.values(torch.stack(list(self.space.rows(contexts)))).sum(0).to(states.dtype)
        joined: Tensor = states + self.down(F.silu(self.up(torch.cat([states, context], -1))))
        return joined
