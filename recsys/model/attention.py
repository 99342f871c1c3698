"""Causal self-attention over packed histories, group by group, without padding beyond a group's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.batch import PackedHistories

NUM_TIME_BUCKETS = 32
ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Multi-head attention of each place to itself and those before it. Shapes: P places, W width, H heads, B histories of L places.

    `softmax` and `ligr`: scaled dot product. `hstu` (Zhai et al. 2024): SiLU of the score plus a learned bias by distance and by time
    between the two, divided by the number of places seen, and the normalised sum gated elementwise.
    """

    def __init__(self, config: Config, has_time: bool) -> None:
        super().__init__()
        model = config.model
        self.num_heads = model.num_heads
        self.is_rotary = model.positions == "rotary"
        self.is_pointwise = model.attention == "hstu"
        self.qkv = nn.Linear(model.width, (4 if self.is_pointwise else 3) * model.width)
        self.out = nn.Linear(model.width, model.width)
        if self.is_pointwise:
            self.norm = nn.LayerNorm(model.width)
            self.distance_bias = nn.Parameter(torch.zeros(model.num_heads, config.data.max_history + model.has_queries))
            self.time_bias = nn.Parameter(torch.zeros(model.num_heads, NUM_TIME_BUCKETS)) if has_time else None

    def forward(self, states: Tensor, histories: PackedHistories) -> Tensor:
        """Map (P, W) to (P, W)."""
        sizes = [number * length for number, length in histories.groups]
        projected = self.qkv(states)
        if self.is_pointwise:
            projected, gate = F.silu(projected).split([3 * states.shape[1], states.shape[1]], -1)
        parts = zip(projected.split(sizes), histories.times.split(sizes), histories.groups, strict=True)
        attended = torch.cat([self._attend_group(part, times, *group) for part, times, group in parts])
        if self.is_pointwise:
            attended = self.norm(attended) * gate
        mapped: Tensor = self.out(attended)
        return mapped

    def _attend_group(self, projected: Tensor, times: Tensor, number: int, length: int) -> Tensor:
        """Attend within histories of one length; `projected` (B x L, 3 W), `times` (B x L)."""
        query, key, value = projected.view(number, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        if self.is_rotary:
            query, key = rotate(query), rotate(key)
        if self.is_pointwise:
            weights = self._pointwise_weights(query @ key.transpose(-1, -2), times.view(number, length))
            attended = weights @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _pointwise_weights(self, scores: Tensor, times: Tensor) -> Tensor:
        """Return the weights of scores (B, H, L, L), 0 for what comes after."""
        places = torch.arange(scores.shape[-1], device=scores.device)
        distance = places[:, None] - places  # (L, L)
        scores = scores + self.distance_bias[:, distance.clamp(min=0)]
        if self.time_bias is not None:
            apart = time_buckets(times[:, :, None] - times[:, None, :])  # (B, L, L)
            scores = scores + self.time_bias[:, apart].transpose(0, 1)
        return F.silu(scores).masked_fill(distance < 0, 0.0) / (places[:, None] + 1)


def rotate(vectors: Tensor) -> Tensor:
    """Turn each pair of dimensions by an angle that grows with the place (Su et al. 2021); vectors (..., L, width of a head)."""
    length, width = vectors.shape[-2:]
    half = width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=vectors.device) / half)
    angles = torch.arange(length, device=vectors.device)[:, None] * frequencies  # (L, half)
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, vectors[..., 2 * half :]], -1)


def time_buckets(seconds: Tensor) -> Tensor:
    """Bucket times between interactions: floor(log2(1 + seconds)), capped; a step back counts as no time."""
    _, exponents = torch.frexp(seconds.clamp(min=0).double() + 1.0)
    return (exponents - 1).clamp(max=NUM_TIME_BUCKETS - 1).long()
