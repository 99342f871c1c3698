"""Encodes packed histories of item vectors as user vectors: a causal Transformer, optionally with recomputed activations."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys.config import Config
from recsys.data.batch import PackedHistories
from recsys.data.manifest import DatasetManifest
from recsys.model.attention import NUM_TIME_BUCKETS, Attention, time_buckets


class UserEncoder(nn.Module):
    """Pre-norm causal Transformer. Shapes: P places of packed histories, W width.

    A history begins at the first of its places, so the causal mask alone keeps padding out of every real place.
    """

    def __init__(self, config: Config, manifest: DatasetManifest) -> None:
        super().__init__()
        model, width = config.model, config.model.width
        self.value_mean, self.value_std = manifest.value_mean, manifest.value_std
        num_places = config.data.max_history + model.has_queries
        self.position = nn.Embedding(num_places, width) if model.positions == "learned" else None
        self.event = nn.Embedding(len(manifest.event_kinds) + 1, width, padding_idx=0) if len(manifest.event_kinds) > 1 else None
        self.gap = nn.Embedding(NUM_TIME_BUCKETS, width) if model.use_gaps and manifest.has_time else None
        self.value = nn.Linear(3, width, bias=False) if model.use_values and manifest.has_values else None
        for embedding in (self.position, self.event, self.gap, self.value):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1 * width**-0.5)
        self.query = nn.Parameter(torch.randn(width) * 0.1 * width**-0.5) if model.has_queries else None
        self.norm_in = nn.LayerNorm(width)
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(config, manifest.has_time and model.use_gaps) for _ in range(model.num_layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, item_vectors: Tensor, histories: PackedHistories, query_vectors: Tensor | None = None) -> Tensor:
        """Encode the item vector of each place (P, W), or its query's (Q, W); return the user after it (P, W)."""
        if self.query is not None and query_vectors is not None and histories.query_places is not None:
            item_vectors = item_vectors.index_add(0, histories.query_places, (query_vectors + self.query).to(item_vectors.dtype))
        states = self.dropout(self.norm_in(item_vectors + self._context(item_vectors, histories)))
        for block in self.blocks:
            states = block(states, histories)
        encoded: Tensor = self.norm_out(states)
        return encoded

    def _context(self, item_vectors: Tensor, histories: PackedHistories) -> Tensor:
        """Add up what is known of each interaction besides its item, (P, W)."""
        context = torch.zeros((), dtype=item_vectors.dtype, device=item_vectors.device)
        if self.position is not None:
            parts = [self.position.weight[:length].repeat(number, 1) for number, length in histories.groups]
            context = context + torch.cat(parts)
        if self.event is not None:
            context = context + self.event(histories.events)
        if self.gap is not None:
            context = context + self.gap(time_buckets(_gaps(histories)))
        if self.value is not None:
            is_known = ~histories.values.isnan()
            value = torch.where(is_known, (histories.values - self.value_mean) / self.value_std, 0.0)
            context = context + self.value(torch.stack([is_known.to(value), value, value.square()], -1).to(item_vectors.dtype))
        return context


class Block(nn.Module):
    """Attention, then a gated feed-forward layer (SwiGLU), each on a normalised input and added to it.

    In `ligr` each is weighed by a gate that sees what it is added to (Borisyuk et al. 2025, LiGR); in `hstu` there is no feed-forward
    layer, the attention is gated itself (Zhai et al. 2024).
    """

    def __init__(self, config: Config, has_time: bool) -> None:
        super().__init__()
        width, kind = config.model.width, config.model.attention
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(config, has_time)
        self.has_feed_forward = kind != "hstu"
        if self.has_feed_forward:
            self.norm_feed_forward = nn.LayerNorm(width)
            self.gate_up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(2 * width, width)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2)) if kind == "ligr" else None
        self.dropout = nn.Dropout(config.model.dropout)

    def forward(self, states: Tensor, histories: PackedHistories) -> Tensor:
        """Map (P, W) to (P, W); a place sees itself and those before it in its history."""
        states = self._add(0, states, self.attention(self.norm_attention(states), histories))
        if not self.has_feed_forward:
            return states
        gate, up = self.gate_up(self.norm_feed_forward(states)).chunk(2, -1)
        return self._add(1, states, self.down(F.silu(gate) * up))

    def _add(self, number: int, states: Tensor, update: Tensor) -> Tensor:
        update = self.dropout(update)
        return states + (update if self.gates is None else update * self.gates[number](states).sigmoid())


def _gaps(histories: PackedHistories) -> Tensor:
    """Return the seconds since the interaction before, (P,), 0 for a history's first."""
    gaps = histories.times.diff(prepend=histories.times[:1])
    parts = gaps.split([number * length for number, length in histories.groups])
    cleared = []
    for part, (number, length) in zip(parts, histories.groups, strict=True):
        rows = part.view(number, length)
        cleared.append(F.pad(rows[:, 1:], (1, 0)).flatten())
    return torch.cat(cleared)


def recompute_activations(module: nn.Module) -> None:
    """Have each layer of the language model and of the user encoder keep its input alone; losses and gradients stay the same to the bit."""
    for part in module.modules():
        enable = getattr(part, "gradient_checkpointing_enable", None)
        if isinstance(part, Block):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
        elif callable(enable):  # a model of transformers
            enable({"use_reentrant": False})
