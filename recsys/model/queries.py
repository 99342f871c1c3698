"""Free-text queries as vectors that join a history: those that training asks by their rows, and what somebody typed by its text."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.rows import Integers
from recsys.errors import UserError
from recsys.model.catalogue_text import Ranks, catalogue_tokens, frozen_vectors
from recsys.model.item_encoder import LENGTH_GROUPS, ItemEncoder, ItemText, Projection, encode_groups
from recsys.model.text_encoder import TextEncoder, encode_texts, group_widths, load_frozen, load_tokenizer, locate_backbone

TOKENIZER_AND_BACKBONE = "text_encoder"
"""The folder of an export that what is typed is encoded with."""


class TrainingQueries(nn.Module):
    """Encodes the queries that training asks, as an item's text is encoded. Shapes: Q queries, R rows of `QueryTexts`, W width.

    Like the item encoder's, the buffers may be views of files that all processes of a node share.
    """

    vectors: Tensor  # (R, H)
    tokens: Tensor  # (R, T)

    def __init__(self, text: ItemText) -> None:
        super().__init__()
        self.register_buffer("vectors", text.vectors, persistent=False)
        self.register_buffer("tokens", text.tokens, persistent=False)
        self.token_counts = torch.zeros(0, dtype=torch.int32) if text.lengths is None else text.lengths  # (R,)
        self.group_widths = group_widths(self.token_counts, LENGTH_GROUPS)

    def forward(self, item_encoder: ItemEncoder, rows: Integers) -> Tensor:
        """Encode rows (Q,) as (Q, W); under ZeRO-3 every rank must call this, without rows too."""
        chosen = torch.from_numpy(rows)
        if item_encoder.text_encoder is None:
            texts = self.vectors[chosen.to(self.vectors.device, non_blocking=True)]
        else:
            texts = encode_groups(item_encoder.text_encoder, self.tokens, self.token_counts, self.group_widths, chosen)
        vectors: Tensor = item_encoder.sources["text"](texts)
        return vectors


class QueryEncoder:
    """Encodes what somebody typed with a trained model's language model and its projection; longer texts are cut."""

    def __init__(self, tokenizer: Any, text_encoder: TextEncoder, projection: nn.Module, max_tokens: int) -> None:
        self._tokenizer, self._text_encoder, self._projection, self._max_tokens = tokenizer, text_encoder, projection, max_tokens

    def __call__(self, queries: Sequence[str]) -> Tensor:
        """Encode queries, of which there is one at least, as (Q, W)."""
        device = next(self._projection.parameters()).device
        texts = encode_texts(self._text_encoder, self._tokenizer, queries, self._max_tokens, device)
        vectors: Tensor = self._projection(texts.to(device))
        return vectors

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the language model's weights as they are now, adapters merged into them."""
        from peft import PeftModel

        backbone: Any = self._text_encoder.backbone
        if isinstance(backbone, PeftModel):
            backbone = copy.deepcopy(backbone).merge_and_unload()
        backbone.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, config: Config, projection_weights: dict[str, Tensor]) -> Self:
        """Load what `save` wrote, and the projection's weights."""
        text_encoder = load_frozen(str(folder), config.model.text, torch.device("cpu"))
        projection = Projection(text_encoder.width, config.model.width)
        projection.load_state_dict(projection_weights)
        return cls(load_tokenizer(str(folder)), text_encoder, projection, config.model.text.max_tokens)


def query_encoder_of(config: Config, dataset: Dataset, item_encoder: ItemEncoder) -> QueryEncoder | None:
    """Make the query encoder of a trained model on the CPU; None where it was trained without queries."""
    text = config.model.text
    if not config.model.has_queries:
        return None
    folder = locate_backbone(text, dataset, Path(config.run.scratch))
    text_encoder = item_encoder.text_encoder or load_frozen(folder, text, torch.device("cpu"))
    return QueryEncoder(load_tokenizer(folder), text_encoder, item_encoder.sources["text"], text.max_tokens)


def read_training_queries(
    config: Config, dataset: Dataset, catalogue: ItemFeatures, device: torch.device, ranks: Ranks
) -> TrainingQueries | None:
    """Read or compute what training asks with; all of `ranks` must call this. None where the model learns no queries.

    Raises:
        UserError: there is nothing to ask with.
    """
    text, scratch = config.model.text, Path(config.run.scratch)
    if not config.model.has_queries:
        return None
    if not dataset.manifest.num_queries and not bool(catalogue.has_text.any()):
        raise UserError(
            f"model.query_rate = {config.model.query_rate}: the events have no column of queries, and the catalogue no text to make "
            "queries of; set model.query_rate=0"
        )
    folder = locate_backbone(text, dataset, scratch)
    if text.mode == "frozen":
        return TrainingQueries(ItemText(vectors=frozen_vectors(folder, text, catalogue, dataset, scratch, device, ranks, of_queries=True)))
    tokens, lengths = catalogue_tokens(folder, text, catalogue, dataset, scratch, of_queries=True)
    return TrainingQueries(ItemText(tokens=tokens, lengths=lengths))
