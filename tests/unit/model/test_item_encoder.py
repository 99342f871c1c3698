"""The item encoder reads the catalogue's files in place: no engine, cast or state dict copies a buffer, and no step writes to one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.data.batch import Batch
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.recommender import Recommender, build_recommender
from recsys.storage import Storage
from recsys.train.engine import Engine
from tests.datasets import make_dataset
from tests.distributed import run_distributed

VALUES = [
    "model.width=16",
    "data.max_history=10",
    "model.text.backbone=tiny",
    "model.text.max_tokens=16",
    "training.num_workers=1",
    "training.global_batch_size=16",
    "training.micro_batch_size=16",
]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(Storage(str(tmp_path / "store")))


def catalogue_buffers(model: Recommender) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.item_encoder.named_buffers(recurse=False) if buffer.numel()}


def first_batch(dataset: Dataset, model: Recommender, config: Config) -> Batch:
    return next(iter(Reader(dataset, model.catalogue, config, Share(0, 1, 1)).steps(0)))[0]


def addresses_before_and_after_training(dataset: Dataset, config: Config) -> list[tuple[str, int, int, str]]:
    device = torch.device("cpu")
    model = build_recommender(config, dataset, device)
    before = {name: (buffer.data_ptr(), buffer.dtype) for name, buffer in catalogue_buffers(model).items()}
    engine = Engine(model, config, device)
    for _ in range(2):
        losses = engine.forward(first_batch(dataset, model, config))
        engine.backward(sum(losses.values()).float() / 100)
        engine.end_micro_batch()
    after = catalogue_buffers(engine.module)
    assert not set(engine.module.state_dict()) & {f"item_encoder.{name}" for name in after}
    return [(name, before[name][0], after[name].data_ptr(), str(after[name].dtype == before[name][1])) for name in before]


@pytest.mark.parametrize(("zero_stage", "precision", "text"), [(2, "bf16", "lora"), (3, "fp32", "frozen")])
def test_the_engine_trains_on_the_files_themselves(dataset: Dataset, tmp_path: Path, zero_stage: int, precision: str, text: str) -> None:
    scratch = tmp_path / "scratch"
    values = [*VALUES, f"training.zero_stage={zero_stage}", f"training.precision={precision}", f"model.text.mode={text}"]
    config = load_config(None, [*values, f"run.scratch={scratch}"])
    build_recommender(config, dataset, torch.device("cpu"))
    content = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (scratch / "catalogues").rglob("*") if path.is_file()}
    [rows] = run_distributed(addresses_before_and_after_training, 1, dataset, config)
    names = {name for name, *_ in rows}
    assert names >= {"train_count", "categories", "numbers", "has_number", "has_text"}
    assert names >= ({"tokens", "token_count"} if text == "lora" else {"text_vectors"})
    for name, before, after, has_same_dtype in rows:
        assert before == after, name
        assert has_same_dtype == "True", name
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in content} == content


def test_building_copies_no_feature(dataset: Dataset, tmp_path: Path) -> None:
    features = ItemFeatures.read(dataset, tmp_path)
    encoder = ItemEncoder(load_config(None, VALUES).model, features, ItemText()).to("cpu")
    for name in ("categories", "numbers", "has_number", "train_count", "has_text"):
        assert getattr(encoder, name).data_ptr() == getattr(features, name).data_ptr(), name


@pytest.mark.parametrize("mode", ["off", "frozen", "full"])
def test_mapped_features_encode_as_those_in_memory(dataset: Dataset, tmp_path: Path, mode: str) -> None:
    config = load_config(None, [*VALUES, f"model.text.mode={mode}", f"run.scratch={tmp_path / 'scratch'}"])
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    mapped = model.item_encoder
    text = ItemText(
        *(None if buffer is None else buffer.clone() for buffer in (mapped.text_vectors, mapped.tokens, mapped.token_count)),
        mapped.text_encoder,
    )
    copied = ItemEncoder(config.model, ItemFeatures.read(dataset), text).eval()
    copied.load_state_dict(mapped.state_dict())
    items = torch.from_numpy(np.arange(41))
    torch.testing.assert_close(copied(items), mapped(items), rtol=0, atol=0)
