"""Turns an item into a vector: id, text, categories, numbers and given vectors, joined by a learned gate."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.data.item_features import ItemFeatures
from recsys.errors import UserError
from recsys.model.text_encoder import TextEncoder
from recsys.model_config import ModelConfig


@dataclass(frozen=True)
class ItemText:
    """What the item encoder gets of the text: frozen vectors, or tokens and the backbone to train. Row 0 is padding.

    Shapes: I items, H the language model's width, T most tokens of one text.
    """

    vectors: Tensor | None = None  # (I + 1, H)
    tokens: Tensor | None = None  # (I + 1, T) int32, right-padded
    lengths: Tensor | None = None  # (I + 1,) int32, the tokens that are real
    encoder: TextEncoder | None = None


class ItemEncoder(nn.Module):
    """Encodes catalogue indices (D,) as vectors (D, W).

    Shapes: D items, W width, S sources. Each source gives a vector of the model's width; a gate that sees all of them
    weighs those that the item has. An item that training never saw has no id vector of its own, so its other sources
    carry it; `id_dropout` trains the model for that.

    The catalogue's buffers may be views of files that all processes of a node share: they are gathered from as they are,
    and only the rows gathered are cast or joined. A copy of a whole buffer here would be one per process.
    """

    train_count: Tensor  # (I + 1,) 0 where training has not seen the item
    categories: Tensor  # (I + 1, K)
    numbers: Tensor  # (I + 1, N)
    has_number: Tensor  # (I + 1, N)
    vectors: Tensor  # (I + 1, V)
    has_text: Tensor  # (I + 1,)
    text_vectors: Tensor  # (I + 1, H)
    tokens: Tensor  # (I + 1, T)
    token_count: Tensor  # (I + 1,)

    def __init__(self, config: ModelConfig, catalogue: ItemFeatures, text: ItemText) -> None:
        super().__init__()
        width = config.width
        self.id_dropout = config.id_dropout
        self.sources = nn.ModuleDict()
        if config.use_ids:
            self.sources["id"] = nn.Embedding(catalogue.num_items + 1, width, padding_idx=0)
        self.text_encoder = text.encoder
        if text.vectors is not None:
            self.sources["text"] = _projection(text.vectors.shape[1], width)
        elif text.encoder is not None:
            self.sources["text"] = _projection(text.encoder.width, width)
        if config.use_features and catalogue.num_categories:
            self.sources["categories"] = nn.Embedding(catalogue.num_categories + 1, width, padding_idx=0)
        if config.use_features and catalogue.numbers.shape[1]:
            self.sources["numbers"] = _projection(2 * catalogue.numbers.shape[1], width)
        if config.use_features and catalogue.vectors.shape[1]:
            self.sources["vector"] = _projection(catalogue.vectors.shape[1], width)
        if not self.sources:
            raise UserError("model: the catalogue has no text and no features, and model.use_ids = false; set model.use_ids=true")
        self.gate = nn.Linear(width * len(self.sources), len(self.sources))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        for source in self.sources.values():
            if isinstance(source, nn.Embedding):
                nn.init.normal_(source.weight, std=width**-0.5)
        self._keep(catalogue, text)

    def _keep(self, catalogue: ItemFeatures, text: ItemText) -> None:
        """Keep the catalogue's features as buffers that no checkpoint holds: the dataset has them."""
        self.register_buffer("train_count", catalogue.train_count, persistent=False)
        self.register_buffer("categories", catalogue.categories, persistent=False)
        self.register_buffer("numbers", catalogue.numbers, persistent=False)
        self.register_buffer("has_number", catalogue.has_number, persistent=False)
        self.register_buffer("vectors", catalogue.vectors, persistent=False)
        self.register_buffer("has_text", catalogue.has_text, persistent=False)
        self.register_buffer("text_vectors", text.vectors, persistent=False)
        self.register_buffer("tokens", text.tokens, persistent=False)
        self.register_buffer("token_count", text.lengths, persistent=False)

    def forward(self, items: Tensor) -> Tensor:
        """Encode items (D,); return (D, W), zero for padding."""
        present, vectors = zip(*(self._encode_source(name, items) for name in self.sources), strict=True)
        stacked = torch.stack(vectors, 1)  # (D, S, W)
        mask = torch.stack(present, 1)  # (D, S)
        stacked = stacked * mask.unsqueeze(-1)
        gate = self.gate(stacked.flatten(1)).masked_fill(~mask, torch.finfo(stacked.dtype).min).softmax(-1) * mask
        return (gate.unsqueeze(-1) * stacked).sum(1)

    def _encode_source(self, name: str, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return which items have this source (D,) and its vectors (D, W)."""
        source = self.sources[name]
        is_real = items != 0
        if name == "id":
            present = self.train_count[items] > 0
            if self.training and self.id_dropout:
                present = present & (torch.rand_like(present, dtype=torch.float32) >= self.id_dropout)
            return present, source(items)
        if name == "text":
            return self.has_text[items] & is_real, source(self._text(items).to(self.gate.weight.dtype))
        if name == "categories":
            categories = self.categories[items].long()  # (D, K)
            count = (categories != 0).sum(1)
            summed = (source(categories) * (categories != 0).unsqueeze(-1)).sum(1)
            return count > 0, summed / count.clamp(min=1).unsqueeze(1)
        features = torch.cat([self.numbers[items], self.has_number[items].float()], 1) if name == "numbers" else self.vectors[items]
        return is_real, source(features.to(self.gate.weight.dtype))

    def _text(self, items: Tensor) -> Tensor:
        if self.text_encoder is None:
            return self.text_vectors[items]
        mask = torch.arange(self.tokens.shape[1], device=items.device) < self.token_count[items].unsqueeze(1)  # (D, T)
        return self.text_encoder(self.tokens[items].long(), mask.long())


def _projection(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width, elementwise_affine=False), _Scale(width))


class _Scale(nn.Module):
    """Brings a normalised vector to the length of an id vector, per dimension and learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), width**-0.5))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors * self.weight
