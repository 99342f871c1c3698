"""Encodes free-text queries as vectors that are part of a user's history."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys.arrays import Integers
from recsys.config import Config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.text.queries import QueryTexts, read_queries
from recsys.errors import UserError
from recsys.model.item_encoder import ItemEncoder, Projection
from recsys.model.text.backbones import load_tokenizer
from recsys.model.text.catalogue_text import Ranks, frozen_vectors, text_tokens
from recsys.model.text.encoder import TextEncoder, encode_groups, encode_texts, group_widths, load_frozen, locate_backbone

TOKENIZER_AND_BACKBONE = "text_encoder"
"""The folder of an export that holds the tokenizer and backbone for queries."""

QUERIES = "queries-v1"
"""Version of the stored queries. Change it when queries are generated differently, so that older ones are not read."""


class TrainingQueries:
    """Encodes training queries in the same way as item texts. Shapes: Q queries, R rows of `QueryTexts`, W width.

    The inputs may not fit on a GPU: they stay on the CPU, in files shared by all processes of a node.
    """

    def __init__(self, texts: Tensor, token_counts: Tensor) -> None:
        """Take frozen vectors (R, H) with empty counts, or tokens (R, T) with the numbers of real tokens (R,)."""
        self._texts, self._token_counts = texts, token_counts
        self._group_widths = group_widths(token_counts)

    def __call__(self, item_encoder: ItemEncoder, rows: Integers) -> Tensor:
        """Encode rows (Q,) as (Q, W). Under ZeRO-3 every rank must call this, even without rows."""
        chosen, projection = torch.from_numpy(rows), item_encoder.sources["text"]
        if item_encoder.text_encoder is None:
            texts = self._texts[chosen].to(next(projection.parameters()).device)
        else:
            texts = encode_groups(item_encoder.text_encoder, self._texts, self._token_counts, self._group_widths, chosen)
        vectors: Tensor = projection(texts)
        return vectors


class QueryEncoder:
    """Encodes queries with a trained language model and its projection; long texts are truncated."""

    def __init__(self, tokenizer: Any, text_encoder: TextEncoder, projection: nn.Module, max_tokens: int) -> None:
        self._tokenizer, self._text_encoder, self._projection, self._max_tokens = tokenizer, text_encoder, projection, max_tokens

    def __call__(self, queries: Sequence[str]) -> Tensor:
        """Encode at least one query; return (Q, W)."""
        device = next(self._projection.parameters()).device
        texts = encode_texts(self._text_encoder, self._tokenizer, queries, self._max_tokens, device)
        vectors: Tensor = self._projection(texts.to(device))
        return vectors

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the language model's current weights, with adapters merged."""
        from peft import PeftModel

        backbone: Any = self._text_encoder.backbone
        if isinstance(backbone, PeftModel):
            backbone = copy.deepcopy(backbone).merge_and_unload()
        backbone.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, config: Config, projection_weights: dict[str, Tensor]) -> Self:
        """Load the files written by `save`, and set the projection's weights."""
        text_encoder = load_frozen(str(folder), config.model.text, torch.device("cpu"))
        projection = Projection(text_encoder.width, config.model.width)
        projection.load_state_dict(projection_weights)
        return cls(load_tokenizer(str(folder)), text_encoder, projection, config.model.text.max_tokens)


def query_encoder_of(config: Config, dataset: Dataset, item_encoder: ItemEncoder) -> QueryEncoder | None:
    """Build the query encoder of a trained model on the CPU; None if it was trained without queries."""
    text = config.model.text
    if not config.model.has_queries:
        return None
    folder = locate_backbone(text, dataset, Path(config.run.scratch))
    text_encoder = item_encoder.text_encoder or load_frozen(folder, text, torch.device("cpu"))
    return QueryEncoder(load_tokenizer(folder), text_encoder, item_encoder.sources["text"], text.max_tokens)


def read_training_queries(
    config: Config, dataset: Dataset, catalogue: ItemFeatures, device: torch.device, ranks: Ranks
) -> TrainingQueries | None:
    """Read or compute the training queries; None if the model does not learn queries. All of `ranks` must call this.

    Raises:
        UserError: the catalogue has no text, so queries cannot be encoded.
    """
    text, scratch = config.model.text, Path(config.run.scratch)
    if not config.model.has_queries:
        return None
    if not bool(catalogue.has_text.any()):
        raise UserError(
            f"model.query_rate = {config.model.query_rate}: the catalogue has no text that a query could match; set model.query_rate=0"
        )
    folder, queries = locate_backbone(text, dataset, scratch), QueryTexts(catalogue.texts, read_queries(dataset, scratch))
    if text.mode == "frozen":
        vectors = frozen_vectors(folder, text, queries, dataset, scratch, device, ranks, QUERIES)
        return TrainingQueries(vectors, torch.zeros(0, dtype=torch.int32))
    return TrainingQueries(*text_tokens(folder, text, queries, dataset, scratch, QUERIES))
