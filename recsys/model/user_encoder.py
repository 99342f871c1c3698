"""The user encoder: a causal Transformer over packed histories of item vectors, with optional activation recomputation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys.config import Config
from recsys.data.batch import PackedHistories, has_profiles, has_start
from recsys.data.manifest import DatasetManifest
from recsys.model.situations import ContextFusion, ProfileEncoder

NUM_TIME_BUCKETS = 32
ROTARY_BASE = 10_000.0
FIRST_RATE = 0.1


class UserEncoder(nn.Module):
    """Pre-norm causal Transformer. Shapes: P places of packed histories, W width.

    Histories are right-padded, so the causal mask alone keeps real places from attending to padding.
    """

    def __init__(self, config: Config, manifest: DatasetManifest) -> None:
        super().__init__()
        model, width = config.model, config.model.width
        self.value_mean, self.value_std = manifest.value_mean, manifest.value_std
        # Besides the history: a query, the start, and an interaction that only exposures follow.
        num_places = config.data.max_history + model.has_queries + has_start(model, manifest) + manifest.has_exposures
        self.position = nn.Embedding(num_places, width) if model.positions == "learned" else None
        self.event = nn.Embedding(len(manifest.event_kinds) + 1, width, padding_idx=0) if len(manifest.event_kinds) > 1 else None
        self.gap = nn.Embedding(NUM_TIME_BUCKETS, width) if model.use_gaps and manifest.has_time else None
        self.value = nn.Linear(3, width, bias=False) if model.use_values and manifest.has_values else None
        for embedding in (self.position, self.event, self.gap, self.value):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1 * width**-0.5)
        self.query = nn.Parameter(torch.randn(width) * 0.1 * width**-0.5) if model.has_queries else None
        self.start = nn.Parameter(torch.randn(width) * 0.1 * width**-0.5) if has_start(model, manifest) else None
        self.profile = ProfileEncoder(manifest.profiles, width) if has_profiles(model, manifest) else None
        self.norm_in = nn.LayerNorm(width)
        self.dropout = nn.Dropout(model.dropout)
        has_time = manifest.has_time and model.use_gaps
        self.blocks = nn.ModuleList(Block(config, num_places, has_time) for _ in range(model.num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.long_term = LongTermProfile(width) if model.use_long_term else None
        self.context = ContextFusion(manifest.contexts, width) if model.use_contexts and manifest.contexts else None

    def forward(self, item_vectors: Tensor, histories: PackedHistories, query_vectors: Tensor | None = None) -> Tensor:
        """Return the user state after each place (P, W); query vectors (Q, W) are added to the item vectors (P, W) at query places."""
        if self.query is not None and query_vectors is not None and histories.query_places is not None:
            item_vectors = item_vectors.index_add(0, histories.query_places, (query_vectors + self.query).to(item_vectors.dtype))
        if self.start is not None and histories.start_places is not None:
            starts = self.start.to(item_vectors.dtype).expand(len(histories.start_places), -1)
            if self.profile is not None:
                starts = starts + self.profile(histories.profiles, len(starts)).to(item_vectors.dtype)
            item_vectors = item_vectors.index_add(0, histories.start_places, starts)
        states = self.dropout(self.norm_in(item_vectors + self._add_ons(item_vectors, histories)))
        for block in self.blocks:
            states = block(states, histories)
        encoded: Tensor = self.norm_out(states)
        return encoded if self.long_term is None else self.long_term(encoded, histories)

    def ask(self, states: Tensor, contexts: Tensor) -> Tensor:
        """Return what retrieval and ranker read, given states (N, W) and the contexts that they are asked in (N,)."""
        return states if self.context is None else self.context(states, contexts)

    def _add_ons(self, item_vectors: Tensor, histories: PackedHistories) -> Tensor:
        """Return the sum of the position, event, time gap and value embeddings, broadcastable to (P, W)."""
        context = torch.zeros((), dtype=item_vectors.dtype, device=item_vectors.device)
        if self.position is not None:
            context = context + torch.cat([self.position.weight[:length].repeat(number, 1) for number, length in histories.groups])
        if self.event is not None:
            context = context + self.event(histories.events)
        if self.gap is not None:
            context = context + self.gap(time_buckets(_gaps(histories)))
        if self.value is not None:
            is_known, value = known_values(histories, self.value_mean, self.value_std)
            context = context + self.value(torch.stack([is_known.to(value), value, value.square()], -1).to(item_vectors.dtype))
        return context


class LongTermProfile(nn.Module):
    """Joins user states H with a long-term profile P: H + D P, where each place updates P = a H + (1 - a) P, from P = 0.

    The rate a is learned and begins at FIRST_RATE. D begins at 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(FIRST_RATE).logit())
        self.down = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, histories: PackedHistories) -> Tensor:
        """Map (P, W) to (P, W)."""
        profiles = torch.cat([(self.weights(part.shape[1]) @ part).flatten(0, 1) for part in by_group(states, histories)])
        joined: Tensor = states + self.down(profiles)
        return joined

    def weights(self, length: int) -> Tensor:
        """Return the weight of each earlier state in the profile of each place, a (1 - a)^distance, (L, L)."""
        rate, places = self.rate.sigmoid(), torch.arange(length, device=self.rate.device)
        distance = places[:, None] - places
        return (rate * (1 - rate) ** distance.clamp(min=0)).masked_fill(distance < 0, 0.0).to(self.down.weight.dtype)


class Block(nn.Module):
    """Attention, then a gated feed-forward layer (SwiGLU), both pre-norm with a residual connection.

    `ligr`: each update is multiplied by a gate computed from the residual input (Borisyuk et al. 2025, LiGR). `hstu`: there is no
    feed-forward layer, and the attention itself is gated (Zhai et al. 2024).
    """

    def __init__(self, config: Config, num_places: int, has_time: bool) -> None:
        super().__init__()
        width, kind = config.model.width, config.model.attention
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(config, num_places, has_time)
        self.has_feed_forward = kind != "hstu"
        if self.has_feed_forward:
            self.norm_feed_forward = nn.LayerNorm(width)
            self.gate_up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(2 * width, width)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2)) if kind == "ligr" else None
        self.dropout = nn.Dropout(config.model.dropout)

    def forward(self, states: Tensor, histories: PackedHistories) -> Tensor:
        """Map (P, W) to (P, W); a place attends to itself and to earlier places of its history."""
        states = self._add(0, states, self.attention(self.norm_attention(states), histories))
        if not self.has_feed_forward:
            return states
        gate, up = self.gate_up(self.norm_feed_forward(states)).chunk(2, -1)
        return self._add(1, states, self.down(F.silu(gate) * up))

    def _add(self, number: int, states: Tensor, update: Tensor) -> Tensor:
        update = self.dropout(update)
        return states + (update if self.gates is None else update * self.gates[number](states).sigmoid())


class Attention(nn.Module):
    """Causal multi-head attention, computed group by group, so a history is padded only to the length of its group.

    `softmax` and `ligr`: scaled dot product. `hstu` (Zhai et al. 2024): SiLU of the score plus learned biases by distance and by time
    difference, divided by the number of visible places; the normalized sum is gated elementwise.
    Shapes: P places, W width, H heads, B histories of L places.
    """

    def __init__(self, config: Config, num_places: int, has_time: bool) -> None:
        super().__init__()
        model = config.model
        self.num_heads = model.num_heads
        self.is_rotary = model.positions == "rotary"
        self.is_pointwise = model.attention == "hstu"
        self.qkv = nn.Linear(model.width, (4 if self.is_pointwise else 3) * model.width)
        self.out = nn.Linear(model.width, model.width)
        if self.is_pointwise:
            self.norm = nn.LayerNorm(model.width)
            self.distance_bias = nn.Parameter(torch.zeros(model.num_heads, num_places))
            self.time_bias = nn.Parameter(torch.zeros(model.num_heads, NUM_TIME_BUCKETS)) if has_time else None

    def forward(self, states: Tensor, histories: PackedHistories) -> Tensor:
        """Map (P, W) to (P, W)."""
        projected = self.qkv(states)
        if self.is_pointwise:
            projected, gate = F.silu(projected).split([3 * states.shape[1], states.shape[1]], -1)
        parts = zip(by_group(projected, histories), by_group(histories.times, histories), strict=True)
        attended = torch.cat([self._attend_group(*part) for part in parts])
        if self.is_pointwise:
            attended = self.norm(attended) * gate
        mapped: Tensor = self.out(attended)
        return mapped

    def _attend_group(self, projected: Tensor, times: Tensor) -> Tensor:
        """Return the attention output (B x L, W) of one group; `projected` is (B, L, 3 W), `times` (B, L)."""
        query, key, value = projected.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H) each
        if self.is_rotary:
            query, key = rotate(query), rotate(key)
        if self.is_pointwise:
            attended = self._pointwise_weights(query @ key.transpose(-1, -2), times) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _pointwise_weights(self, scores: Tensor, times: Tensor) -> Tensor:
        """Return the attention weights of scores (B, H, L, L), 0 for later places."""
        places = torch.arange(scores.shape[-1], device=scores.device)
        distance = places[:, None] - places  # (L, L)
        scores = scores + self.distance_bias[:, distance.clamp(min=0)]
        if self.time_bias is not None:
            apart = time_buckets(times[:, :, None] - times[:, None, :])  # (B, L, L)
            scores = scores + self.time_bias[:, apart].transpose(0, 1)
        return F.silu(scores).masked_fill(distance < 0, 0.0) / (places[:, None] + 1)


def rotate(vectors: Tensor) -> Tensor:
    """Rotate each pair of dimensions by an angle proportional to the place (RoPE: Su et al. 2021); vectors (..., L, width of a head)."""
    length, width = vectors.shape[-2:]
    half = width // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=vectors.device) / half)
    angles = torch.arange(length, device=vectors.device)[:, None] * frequencies  # (L, half)
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, vectors[..., 2 * half :]], -1)


def by_group(values: Tensor, histories: PackedHistories) -> list[Tensor]:
    """Split the values of places (P, ...) into a tensor (B, L, ...) per group of histories."""
    parts = values.split([number * length for number, length in histories.groups])
    return [part.unflatten(0, group) for part, group in zip(parts, histories.groups, strict=True)]


def known_values(histories: PackedHistories, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Return the mask of places that have a value (P,), and the standardized values (P,), 0 without a value."""
    is_known = ~histories.values.isnan()
    return is_known, torch.where(is_known, (histories.values - mean) / std, 0.0)


def time_buckets(seconds: Tensor) -> Tensor:
    """Return the bucket of times between interactions: floor(log2(1 + seconds)), capped; negative times count as 0."""
    _, exponents = torch.frexp(seconds.clamp(min=0).double() + 1.0)
    return (exponents - 1).clamp(max=NUM_TIME_BUCKETS - 1).long()


def _gaps(histories: PackedHistories) -> Tensor:
    """Return the seconds since the previous interaction (P,), 0 for the first of a history."""
    return torch.cat([F.pad(times.diff(), (1, 0)).flatten() for times in by_group(histories.times, histories)])


def recompute_activations(module: nn.Module) -> None:
    """Enable activation recomputation in each layer of the language model and the user encoder; losses and gradients are bit-identical."""
    for part in module.modules():
        enable = getattr(part, "gradient_checkpointing_enable", None)
        if isinstance(part, Block):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
        elif callable(enable):  # a Hugging Face model
            enable({"use_reentrant": False})
