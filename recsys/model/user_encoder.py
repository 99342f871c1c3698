"""Turns a history of item vectors into a user vector after each position: a causal Transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.rows import NUM_GAP_BUCKETS
from recsys.model_config import ModelConfig


class UserEncoder(nn.Module):
    """Pre-norm causal Transformer. Shapes: B users, L history, W width.

    Histories are aligned left, so the causal mask alone keeps padding out of every real position.
    """

    def __init__(self, config: ModelConfig, max_history: int, num_event_kinds: int, has_time: bool) -> None:
        super().__init__()
        width = config.width
        self.position = nn.Embedding(max_history, width)
        self.event = nn.Embedding(num_event_kinds + 1, width, padding_idx=0) if num_event_kinds > 1 else None
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, width) if config.use_gaps and has_time else None
        for embedding in (self.position, self.event, self.gap):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1 * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.dropout) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, item_vectors: Tensor, events: Tensor, gaps: Tensor) -> Tensor:
        """Encode item vectors (B, L, W), event kinds (B, L) from 1, gap buckets (B, L); return (B, L, W)."""
        states = item_vectors + self.position(torch.arange(item_vectors.shape[1], device=events.device))
        if self.event is not None:
            states = states + self.event(events)
        if self.gap is not None:
            states = states + self.gap(gaps)
        states = self.dropout(self.norm_in(states))
        for block in self.blocks:
            states = block(states)
        encoded: Tensor = self.norm_out(states)
        return encoded


class Block(nn.Module):
    """Attention, then a gated feed-forward layer (SwiGLU), each on a normalised input and added to it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, L, W) to (B, L, W); position t sees positions up to t."""
        states = states + self.dropout(self._attend(self.norm_attention(states)))
        gate, up = self.gate_up(self.norm_feed_forward(states)).chunk(2, -1)
        return states + self.dropout(self.down(F.silu(gate) * up))

    def _attend(self, states: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(states).chunk(3, -1)
        )  # (B, heads, L, W / heads)
        attended: Tensor = self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return attended
