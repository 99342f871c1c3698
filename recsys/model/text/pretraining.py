"""Pretraining of the language model on item texts: token prediction, and contrastive learning on pairs of texts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.text.corpus import NO_TARGET, MaskedTokens, Pairs, TextBatch, TokenMasking
from recsys.errors import UserError
from recsys.model.retrieval import gather_from_ranks
from recsys.model.text.backbones import load_backbone, load_tokenizer
from recsys.model.text.encoder import TextEncoder, token_mask
from recsys.schema import PADDING_ITEM

MASKED, CONTRASTIVE = "masked", "contrastive"
BACKBONE_PREFIX = "text_encoder.pooled.backbone."
"""Prefix of the backbone's weights in the state of a `Pretrainer`."""


class Pretrainer(nn.Module):
    """The trained module, from a TextBatch to losses by name.

    Shapes: B items, T tokens, N tokens to predict, H the language model's width, C candidates.
    """

    def __init__(self, text_encoder: TextEncoder, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.text_encoder = nn.ModuleDict({"pooled": text_encoder, "head": head})  # this name selects the backbone's learning rate
        self.temperature = temperature

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        """Return the sum of each loss over its targets, by name."""
        result = {}
        if batch.masked:
            result[MASKED] = F.cross_entropy(*self.predict(batch.masked), reduction="sum")
        if batch.pairs:
            items, partners = self.encode(batch.pairs)
            candidates, candidate_ids = gather_from_ranks(partners), gather_from_ranks(batch.pairs.partners)
            scores = pair_scores(items, partners, candidates, candidate_ids, batch.pairs) / self.temperature
            result[CONTRASTIVE] = (scores.logsumexp(1) - scores[:, 0])[batch.pairs.partners != PADDING_ITEM].sum()
        return result

    def predict(self, masked: MaskedTokens) -> tuple[Tensor, Tensor]:
        """Return the logits (N, vocabulary) in float32, and the target tokens (N,)."""
        mask, is_target = token_mask(masked.lengths, masked.tokens.shape[1]), masked.targets != NO_TARGET
        backbone: Any = self.text_encoder["pooled"].backbone
        states = backbone(input_ids=masked.tokens, attention_mask=mask).last_hidden_state  # (B, T, H)
        return self.text_encoder["head"](states[is_target]).float(), masked.targets[is_target]

    def encode(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the vectors of the items and of their paired items, (B, H) each, float32 and normalized."""
        vectors = self.text_encoder["pooled"](pairs.tokens, token_mask(pairs.lengths, pairs.tokens.shape[1]))
        items, partners = F.normalize(vectors.float(), dim=-1).chunk(2)
        return items, partners


def pair_scores(items: Tensor, partners: Tensor, candidates: Tensor, candidate_ids: Tensor, pairs: Pairs) -> Tensor:
    """Return the cosine of each item with its paired item, followed by those with the candidates (C, H); (B, 1 + C).

    Known pairs of the item, the item itself and padding are masked with minus infinity.
    """
    out = (candidate_ids == pairs.known.unsqueeze(-1)).any(1) | (candidate_ids == pairs.items.unsqueeze(1))  # (B, C)
    scores = (items @ candidates.T).masked_fill(out | (candidate_ids == PADDING_ITEM), -torch.inf)
    return torch.cat([(items * partners).sum(-1, keepdim=True), scores], 1)


def build_pretrainer(config: Config, folder: str) -> tuple[Pretrainer, TokenMasking | None]:
    """Build the module from the backbone in `folder`, with all weights trained, and the token masking (None without token prediction).

    Raises:
        UserError: the backbone cannot be loaded, or cannot predict tokens although the objectives need it.
    """
    settings, text = config.pretraining, config.model.text.model_copy(update={"mode": "full"})
    torch.manual_seed(config.training.seed)  # for a head without pretrained weights
    encoder = TextEncoder(load_backbone(folder, text), text.pooling)
    if MASKED not in settings.objectives:
        return Pretrainer(encoder, nn.Identity(), settings.temperature), None
    kind, is_causal = _language_model(encoder.backbone.config, text.backbone)
    head = _own_head(kind, folder, encoder.backbone) or _new_head(encoder.backbone, is_causal)
    return Pretrainer(encoder, head, settings.temperature), _token_masking(folder, config, is_causal)


def check_objectives(config: Config, folder: str) -> None:
    """Check that a backbone supports `pretraining.objectives`, from its config and tokenizer in `folder`.

    Raises:
        UserError: it cannot predict tokens, or its tokenizer has no token to mask with.
    """
    from transformers import AutoConfig

    if MASKED in config.pretraining.objectives:
        _, is_causal = _language_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), config.model.text.backbone)
        _token_masking(folder, config, is_causal)


def _language_model(backbone_config: Any, name: str) -> tuple[Any, bool]:
    """Return the model class that predicts this backbone's tokens, and whether it is causal."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for kinds, is_causal in ((MODEL_FOR_MASKED_LM_MAPPING, False), (MODEL_FOR_CAUSAL_LM_MAPPING, True)):
        if type(backbone_config) in kinds:
            return kinds[type(backbone_config)], is_causal
    raise UserError(
        f"model.text.backbone = {name}: a model of type {backbone_config.model_type} predicts no tokens; "
        "pretraining.objectives=['contrastive'] would work"
    )


def _own_head(kind: Any, folder: str, backbone: Any) -> nn.Module | None:
    """Load the head that was trained with the backbone; None if the folder has none or it is not a single module."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn about missing head weights, which are checked below
    try:
        model, info = kind.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    names = [name for name, child in model.named_children() if child is not model.base_model]
    if len(names) != 1 or any(key.startswith(f"{names[0]}.") for key in info["missing_keys"]):
        return None
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = backbone.get_input_embeddings().weight
    head: nn.Module = getattr(model, names[0])
    return head


def _new_head(backbone: Any, is_causal: bool) -> nn.Module:
    """Build a head whose last layer shares the input embeddings: alone for a decoder, after BERT's transform for an encoder."""
    embeddings = backbone.get_input_embeddings()
    vocabulary, width = embeddings.weight.shape
    decoder = nn.Linear(width, vocabulary, bias=not is_causal)
    decoder.weight = embeddings.weight
    if is_causal:
        return decoder
    nn.init.zeros_(decoder.bias)
    return nn.Sequential(nn.Linear(backbone.config.hidden_size, width), nn.GELU(), nn.LayerNorm(width), decoder)


def _token_masking(folder: str, config: Config, is_causal: bool) -> TokenMasking:
    """Return the token masking; without a mask token, the tokenizer's unknown token is used."""
    tokenizer = load_tokenizer(folder)
    mask_token = tokenizer.unk_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
    if mask_token is None and not is_causal:
        raise UserError(
            f"model.text.backbone = {config.model.text.backbone}: its tokenizer has neither a mask token nor an unknown token; "
            "pretraining.objectives=['contrastive'] would work"
        )
    return TokenMasking(
        config.pretraining.mask_fraction, None if is_causal else mask_token, tuple(tokenizer.all_special_ids), len(tokenizer)
    )
