"""The language model over item text: encoders and decoders, pooling, trained parameters, and the tiny backbone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from recsys.config.model import TextConfig
from recsys.data.manifest import Dataset
from recsys.model.text import encoder as text_encoder
from recsys.model.text.backbones import load_backbone, load_tokenizer
from recsys.model.text.encoder import (
    TextEncoder,
    _train_tokenizer,
    encode_texts,
    group_widths,
    locate_backbone,
    tokenize,
)
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.distributed import run_distributed

TEXT = TextConfig(backbone="tiny", max_tokens=16)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

CPU = torch.device("cpu")
TEXTS = ["a story", "a tale about the number 7 of many", "story", "the number 12"]
DECODER_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ENCODER_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BACKBONES: dict[str, Any] = {
    "bert": lambda size: BertModel(BertConfig(vocab_size=size, **ENCODER_SHAPE)),
    "llama": lambda size: LlamaModel(LlamaConfig(vocab_size=size, **DECODER_SHAPE)),
    "qwen2": lambda size: Qwen2Model(Qwen2Config(vocab_size=size, **DECODER_SHAPE)),
}


@pytest.fixture(params=sorted(BACKBONES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder with a backbone with random weights and a tokenizer that pads on the left, as is usual for decoders."""
    tokenizer = _train_tokenizer(TEXTS * 50)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    BACKBONES[request.param](len(tokenizer)).save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder: str, mode: str, pooling: str = "last") -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(load_backbone(folder, TextConfig(mode=mode, backbone=folder)), pooling)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_changes_no_vector(folder: str, pooling: str) -> None:
    encoder, tokenizer = load(folder, "full", pooling).eval(), load_tokenizer(folder)
    together = encoder(*tokenize(tokenizer, TEXTS, 16))
    assert together.shape == (4, 32)
    for text, vector in zip(TEXTS, together, strict=True):
        tokens, mask = tokenize(tokenizer, [text], 16)
        assert bool(mask.all())
        hidden = encoder.backbone(input_ids=tokens).last_hidden_state[0]  # (T, H), without padding and mask
        expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode_texts(encoder, tokenizer, TEXTS, 16, CPU), together.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_step_changes_the_adapters_alone_or_all(folder: str, mode: str) -> None:
    encoder = load(folder, mode)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's A moves only after B, which starts at zero
        optimizer.zero_grad()
        (encoder(*tokenize(load_tokenizer(folder), TEXTS, 16)) * torch.arange(32.0)).sum().backward()
        optimizer.step()
    changed = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert changed == (adapters or set(before))
    assert bool(adapters) == (mode == "lora")


def test_adapters_start_as_nothing_and_no_cache_is_kept(folder: str) -> None:
    tokens = tokenize(load_tokenizer(folder), TEXTS, 16)
    adapted, full = load(folder, "lora").eval(), load(folder, "full").eval()
    torch.testing.assert_close(adapted(*tokens), full(*tokens))
    assert getattr(full.backbone(input_ids=tokens[0], attention_mask=tokens[1]), "past_key_values", None) is None


def test_group_widths_leave_the_least_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 9, (12,), generator=generator, dtype=torch.int32)
        widths = group_widths(lengths, 3).tolist()
        assert len(widths) <= 3
        assert padded(lengths, widths) == min(padded(lengths, choice) for choice in choices(lengths, 3))
    assert group_widths(torch.tensor([5, 5], dtype=torch.int32), 3).tolist() == [5]


def choices(lengths: torch.Tensor, most: int) -> list[list[int]]:
    distinct = lengths.unique().tolist()
    return [
        [*cut, distinct[-1]] for size in range(1, min(most, len(distinct)) + 1) for cut in itertools.combinations(distinct[:-1], size - 1)
    ]


def padded(lengths: torch.Tensor, widths: list[int]) -> int:
    return sum(min(width for width in widths if width >= length) for length in lengths.tolist())


def locate_in_turn(dataset: Dataset, scratch: Path) -> dict[str, bytes]:
    """Locate the backbone on the last rank first."""
    if dist.get_rank() == 0:
        dist.barrier()
    folder = Path(locate_backbone(TEXT, dataset, scratch))
    if dist.get_rank() != 0:
        dist.barrier()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_rank_can_make_the_tiny_backbone(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    first, last = run_distributed(locate_in_turn, 2, dataset, tmp_path / "scratch")
    assert set(last) == FILES
    assert first == last
    alone = make_dataset(Storage(str(tmp_path / "another")))
    folder = Path(locate_backbone(TEXT, alone, tmp_path / "another-scratch"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_tokenizer_of_a_large_catalogue_learns_from_texts_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "TINY_TEXTS", 10)
    dataset = make_dataset(Storage(str(tmp_path / "store")), num_items=400)
    folder = locate_backbone(TEXT, dataset, tmp_path / "scratch")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("the number")
    assert tokenizer.unk_token_id not in tokenizer("story about the number 1")["input_ids"]
    assert load_backbone(folder, TEXT).config.vocab_size == len(tokenizer)
