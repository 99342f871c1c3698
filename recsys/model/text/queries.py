"""Encodes free-text queries as vectors that join a history."""

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
"""The folder of an export that what is typed is encoded with."""

QUERIES = "queries-v1"
"""Changes with how queries are made, so that none made otherwise are read."""


class TrainingQueries:
    """Encodes the queries that training asks, as an item's text is encoded. Shapes: Q queries, R rows of `QueryTexts`, W width.

    There may be more of them than a GPU holds: they stay on the CPU, in files that all processes of a node share.
    """

    def __init__(self, texts: Tensor, token_counts: Tensor) -> None:
        """Take frozen vectors (R, H) and no counts, or tokens (R, T) and how many are real (R,)."""
        self._texts, self._token_counts = texts, token_counts
        self._group_widths = group_widths(token_counts)

    def __call__(self, item_encoder: ItemEncoder, rows: Integers) -> Tensor:
        """Encode rows (Q,) as (Q, W); under ZeRO-3 every rank must call this, without rows too."""
        chosen, projection = torch.from_numpy(rows), item_encoder.sources["text"]
        if item_encoder.text_encoder is None:
            texts = self._texts[chosen].to(next(projection.parameters()).device)
        else:
            texts = encode_groups(item_encoder.text_encoder, self._texts, self._token_counts, self._group_widths, chosen)
        vectors: Tensor = projection(texts)
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
        UserError: the catalogue has no text, so that there is nothing to encode queries with.
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
