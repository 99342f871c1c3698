"""The language model over item text: the tiny backbone, whoever makes it."""

from pathlib import Path

import pytest
import torch.distributed as dist

from recsys.data.manifest import Dataset
from recsys.model import text_encoder
from recsys.model.text_encoder import load_backbone, load_tokenizer, locate_backbone
from recsys.model_config import TextConfig
from recsys.storage import Storage
from tests.datasets import make_dataset
from tests.distributed import run_distributed

TEXT = TextConfig(backbone="tiny", max_tokens=16)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def locate_in_turn(dataset: Dataset, scratch: Path) -> dict[str, bytes]:
    """Let the last rank come first."""
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
