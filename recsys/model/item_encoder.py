"""The item encoder: combines an item's id, text, categories, numbers and provided vectors with a learned gate."""

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config.model import ModelConfig
from recsys.data.draws import stable_hash
from recsys.data.items import ItemFeatures
from recsys.errors import UserError
from recsys.model.retrieval import gather_from_ranks
from recsys.model.text.encoder import TextEncoder, encode_groups, group_widths

ENCODE_CHUNK = 256
"""Number of texts that a refresh encodes at once."""

PRESENCE = {"id": "train_count", "text": "has_text", "categories": "categories", "numbers": "has_number", "vector": "vectors"}
"""For each source, the buffer whose row is non-zero if an item has this source."""


@dataclass(frozen=True)
class ItemText:
    """Text inputs of the item encoder: frozen vectors, or tokens and the backbone to train. Row 0 is padding.

    Shapes: I items, H the language model's width, T maximum tokens per text.
    """

    vectors: Tensor | None = None  # (I + 1, H)
    tokens: Tensor | None = None  # (I + 1, T) int32, right-padded
    lengths: Tensor | None = None  # (I + 1,) int32, number of real tokens
    encoder: TextEncoder | None = None


class ItemEncoder(nn.Module):
    """Encodes catalogue indices (D,) as vectors (D, W).

    Shapes: D items, W width, S sources. Each source returns a vector of the model's width, zero for items without this source. A gate
    that sees all sources weights the ones that an item has. Items not seen in training have no id vector, so their other sources
    represent them; `id_dropout` trains the model for this case, on items that have another source.

    The catalogue's buffers may be memory-mapped files shared by all processes of a node. Gather rows first, then cast or concatenate
    only these rows: a copy of a whole buffer would use memory in every process.
    """

    train_count: Tensor  # (I + 1,) 0 for items not seen in training
    categories: Tensor  # (I + 1, K)
    numbers: Tensor  # (I + 1, N)
    has_number: Tensor  # (I + 1, N)
    vectors: Tensor  # (I + 1, V)
    has_text: Tensor  # (I + 1,)
    text_vectors: Tensor  # (I + 1, H)
    tokens: Tensor  # (I + 1, T)
    kept_text: Tensor | None  # (I + 1, H) cached text embeddings, for items outside the micro batch

    def __init__(self, config: ModelConfig, catalogue: ItemFeatures, text: ItemText) -> None:
        super().__init__()
        self.id_dropout = config.id_dropout
        self.is_text_asked = config.ranker.kind == "additive"
        self.sources = _sources(config, catalogue, text)
        if not self.sources:
            raise UserError("model: the catalogue has no text and no features, and model.use_ids = false; set model.use_ids=true")
        self.gates = nn.ModuleDict()
        if len(self.sources) > 1:
            self.gates.update({name: nn.Linear(config.width, len(self.sources)) for name in self.sources})
        for parameter in self.gates.parameters():
            nn.init.zeros_(parameter)
        self.text_encoder = text.encoder
        for name in ("train_count", "categories", "numbers", "has_number", "vectors", "has_text"):
            self.register_buffer(name, getattr(catalogue, name), persistent=False)  # not in checkpoints: the dataset has them
        self.register_buffer("text_vectors", text.vectors, persistent=False)
        self.register_buffer("tokens", text.tokens, persistent=False)
        self.token_counts = torch.zeros(0, dtype=torch.int32) if text.lengths is None else text.lengths  # (I + 1,) on the CPU
        self.group_widths = group_widths(self.token_counts)
        kept = torch.zeros(catalogue.num_items + 1, text.encoder.width) if config.caches_texts and text.encoder else None
        self.register_buffer("kept_text", kept)  # its name in checkpoints

    def forward(self, items: Tensor | None = None, on_host: Tensor | None = None) -> Tensor:
        """Encode items (D,), or the whole catalogue in order if None; return (D, W), zero for padding.

        `on_host` is a copy of the items on the CPU, which avoids waiting for the device when a language model is trained. If `items` is
        None, it may be a subset of the catalogue: the language model encodes these texts, the other items use cached text embeddings.
        """
        return self.with_text(items, on_host)[0]

    def with_text(self, items: Tensor | None = None, on_host: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode as `forward` does; also return the vectors of the text source (D, W) if there is one and the ranker needs it."""
        present = {name: self._has(name, items) for name in self.sources}
        if self.training and self.id_dropout and "id" in present and len(present) > 1:
            others = torch.stack([has for name, has in present.items() if name != "id"]).any(0)
            present["id"] = present["id"] & ~(others & (torch.rand(others.shape, device=others.device) < self.id_dropout))
        vectors = {name: self._encode_source(name, items, on_host, present[name]) for name in self.sources}
        return self._join(vectors, present), vectors.get("text") if self.is_text_asked else None

    def _has(self, name: str, items: Tensor | None) -> Tensor:
        """Return the mask (D,) of items that have a source; False for padding."""
        has = _rows(self.get_buffer(PRESENCE[name]), items) != 0
        return has if has.dim() == 1 else has.any(1)

    def _encode_source(self, name: str, items: Tensor | None, on_host: Tensor | None, present: Tensor) -> Tensor:
        """Return a source's vectors (D, W), zero where `present` (D,) is False."""
        features = items
        if name == "text":
            features = self._text(items, on_host)
        elif name == "numbers":
            features = torch.cat([_rows(self.numbers, items), _rows(self.has_number, items).float()], 1)
        elif name != "id":
            features = _rows(self.categories if name == "categories" else self.vectors, items)
        vectors: Tensor = self.sources[name](features)
        return vectors * present.unsqueeze(1).to(vectors.dtype)

    def _text(self, items: Tensor | None, on_host: Tensor | None = None) -> Tensor:
        """Return text embeddings (D, H): frozen vectors, or the language model's output if it is trained."""
        if self.text_encoder is None:
            return _rows(self.text_vectors, items)
        if on_host is None:
            on_host = torch.arange(len(self.token_counts)) if items is None else items.cpu()
        fresh = encode_groups(self.text_encoder, self.tokens, self.token_counts, self.group_widths, on_host)
        if self.kept_text is None or items is not None or len(on_host) == len(self.token_counts):
            return fresh
        return self.kept_text.index_copy(0, on_host.to(fresh.device, non_blocking=True), fresh.to(self.kept_text.dtype))

    @torch.no_grad()
    def refresh_texts(self, rank: int, world_size: int) -> None:
        """Encode all texts with the current language model, split over the ranks, and cache the embeddings. Every rank must call this."""
        if self.text_encoder is None or self.kept_text is None:
            return
        num_rows = len(self.token_counts)
        rows = torch.arange(-(-num_rows // world_size)) * world_size + rank
        rows[rows >= num_rows] = 0  # the same number on every rank: a ZeRO-3 forward is collective
        was_training = self.training
        self.eval()
        table = self.tokens, self.token_counts, self.group_widths
        own = torch.cat([encode_groups(self.text_encoder, *table, chunk) for chunk in rows.split(ENCODE_CHUNK)])
        self.train(was_training)
        vectors = gather_from_ranks(own).unflatten(0, (world_size, -1))
        self.kept_text.copy_(vectors.transpose(0, 1).flatten(0, 1)[:num_rows])

    def _join(self, vectors: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Return the sum of the sources' vectors, weighted by the gate; a single source is returned unchanged."""
        if len(vectors) == 1:
            return next(iter(vectors.values()))
        logits = reduce(torch.add, [self.gates[name](vector) for name, vector in vectors.items()])  # (D, S)
        is_absent = ~torch.stack(list(present.values()), 1)
        weights = logits.masked_fill(is_absent, torch.finfo(logits.dtype).min).softmax(-1)
        return reduce(torch.add, [weight.unsqueeze(1) * vector for weight, vector in zip(weights.unbind(1), vectors.values(), strict=True)])


def _sources(config: ModelConfig, catalogue: ItemFeatures, text: ItemText) -> nn.ModuleDict:
    """Build an encoder for each source that the config enables and the catalogue has."""
    width, sources = config.width, nn.ModuleDict()
    if config.use_ids and config.id_buckets:
        sources["id"] = HashedIds(catalogue.num_items, config.id_buckets, config.id_hashes, width)
    elif config.use_ids:
        sources["id"] = IdTable(catalogue.num_items, width)
    if text.vectors is not None:
        sources["text"] = Projection(text.vectors.shape[1], width)
    elif text.encoder is not None:
        sources["text"] = Projection(text.encoder.width, width)
    if config.use_features and catalogue.num_categories:
        categories = nn.EmbeddingBag(catalogue.num_categories + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(categories.weight, std=width**-0.5)
        sources["categories"] = categories
    if config.use_features and catalogue.numbers.shape[1]:
        sources["numbers"] = Projection(2 * catalogue.numbers.shape[1], width)
    if config.use_features and catalogue.vectors.shape[1]:
        sources["vector"] = Projection(catalogue.vectors.shape[1], width)
    return sources


class IdTable(nn.Module):
    """An embedding table with a row per item. Shapes: I items, D requested items, W width."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_items + 1, width) * width**-0.5)  # (I + 1, W)

    def forward(self, items: Tensor | None) -> Tensor:
        """Return vectors (D, W); if `items` is None, the whole table without a gather."""
        return self.weight if items is None else F.embedding(items, self.weight)


class HashedIds(nn.Module):
    """The sum of H rows of a table with B rows; independent hashes of the catalogue index choose the rows and their signs.

    The signs (Weinberger et al. 2009) make collisions cancel on average. With I items, about H I / B of them share a row, but almost
    none share all rows and signs: about I^2 H! / 2 (2 B)^H pairs of items have the same vector. With 100 M items, H = 2 and
    B = 10 M rows: 25 pairs.
    """

    def __init__(self, num_items: int, num_buckets: int, num_hashes: int, width: int) -> None:
        super().__init__()
        self.num_items, self.num_hashes = num_items, num_hashes
        self.weight = nn.Parameter(torch.randn(num_buckets, width) * (num_hashes * width) ** -0.5)  # (B, W)

    def forward(self, items: Tensor | None) -> Tensor:
        """Return vectors (D, W); if `items` is None, those of the whole catalogue."""
        rows, signs = self.pick(torch.arange(self.num_items + 1, device=self.weight.device) if items is None else items)
        return F.embedding_bag(rows, self.weight, mode="sum", per_sample_weights=signs.to(self.weight.dtype))

    def pick(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row indices of items (D,) and their signs, both (D, H)."""
        hashes = torch.stack([stable_hash(items, seed) for seed in range(self.num_hashes)], 1)
        return (hashes >> 1) % len(self.weight), 1 - 2 * (hashes & 1)


class Projection(nn.Module):
    """Projects features to the model's width, with layer normalization and a learned scale that starts at the norm of an id vector."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, width)
        self.scale = nn.Parameter(torch.full((width,), width**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Project features (D, F) to (D, W)."""
        projected = self.linear(features.to(self.linear.weight.dtype))
        return F.layer_norm(projected, projected.shape[-1:]) * self.scale


def _rows(table: Tensor, items: Tensor | None) -> Tensor:
    """Gather the rows of items; return the whole table if `items` is None."""
    return table if items is None else table[items]
