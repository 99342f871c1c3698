"""Tiny language models with random weights, one per family, saved in the format of Hugging Face models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from recsys.model.text.encoder import _train_tokenizer

TEXTS = [f"Story {number}. A {genre} about the number {number}" for number in range(40) for genre in ("comedy", "drama", "western")]
_DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}

FAMILIES: dict[str, Callable[[int], Any]] = {
    "bert": lambda size: transformers.BertModel(transformers.BertConfig(vocab_size=size, **_ENCODER)),
    "roberta": lambda size: transformers.RobertaModel(transformers.RobertaConfig(vocab_size=size, pad_token_id=0, **_ENCODER)),
    "gpt2": lambda size: transformers.GPT2Model(transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda size: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=size, **_DECODER)),
    "qwen": lambda size: transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=size, head_dim=8, **_DECODER)),
    "gemma": lambda size: transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=size, head_dim=8, **_DECODER)),
    "mistral": lambda size: transformers.MistralModel(transformers.MistralConfig(vocab_size=size, head_dim=8, **_DECODER)),
    "t5": lambda size: transformers.T5Model(
        transformers.T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "modernbert": lambda size: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            vocab_size=size, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, **_ENCODER
        )
    ),
}


def save_backbone(folder: Path, family: str) -> str:
    """Save a model of a family, with a tokenizer trained on `TEXTS`, and return the folder."""
    tokenizer = _train_tokenizer(TEXTS)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FAMILIES[family](len(tokenizer)).save_pretrained(folder)
    return str(folder)
