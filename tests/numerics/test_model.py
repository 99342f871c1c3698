"""The model: causal, blind to padding, cold items carried by their features, each distinct item encoded once."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from recsys.config import Config, load_config
from recsys.data.batch import Batch, Collator
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.rows import Rows
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.recommender import Recommender, build_recommender
from recsys.model.text_encoder import _train_tokenizer
from recsys.storage import Storage
from tests.datasets import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    scratch = str(tmp_path_factory.mktemp("scratch"))
    return load_config().with_values({"model.width": 16, "data.max_history": 10, "model.text.mode": "off", "run.scratch": scratch})


@pytest.fixture(scope="module")
def batch(dataset: Dataset) -> Batch:
    rows = dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 8)
    empty = torch.zeros(0, dtype=torch.long)
    return Collator(dataset.manifest, takes_whole_catalogue=True)(Rows.from_table(rows, np.arange(8)), empty, torch.zeros(0))


def states(model: Recommender, batch: Batch) -> torch.Tensor:
    return model.user_encoder(model.item_encoder(batch.items)[batch.history], batch.events, batch.gaps)


def test_a_position_sees_nothing_that_comes_after_it(config: Config, dataset: Dataset, batch: Batch) -> None:
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    changed = dataclasses.replace(batch, history=batch.history.clone(), events=batch.events.clone(), gaps=batch.gaps.clone())
    changed.history[:, 5:] = 1
    changed.events[:, 5:] = 1
    changed.gaps[:, 5:] = 9
    before, after = states(model, batch), states(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_padding_changes_no_loss(config: Config, dataset: Dataset, batch: Batch) -> None:
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    padded = {name: torch.nn.functional.pad(getattr(batch, name), (0, 3)) for name in ("history", "events", "gaps", "targets")}
    padded |= {name: torch.nn.functional.pad(getattr(batch, name), (0, 0, 0, 3)) for name in ("labels", "label_mask")}
    shorter = build_recommender(config, dataset, torch.device("cpu")).eval()(batch)
    if batch.history.shape[1] + 3 <= config.data.max_history:
        longer = model(dataclasses.replace(batch, **padded))
    else:
        wide = config.with_values({"data.max_history": batch.history.shape[1] + 3})
        roomy = build_recommender(wide, dataset, torch.device("cpu")).eval()
        weights = model.state_dict()
        weights["user_encoder.position.weight"] = torch.cat([weights["user_encoder.position.weight"], torch.zeros(3, config.model.width)])[
            : wide.data.max_history
        ]
        roomy.load_state_dict(weights)
        longer = roomy(dataclasses.replace(batch, **padded))
    for name, loss in shorter.items():
        torch.testing.assert_close(longer[name], loss, rtol=1e-5, atol=1e-5)


def test_one_item_twice_in_a_batch_gets_the_sum_of_its_gradients(config: Config, dataset: Dataset) -> None:
    features = ItemFeatures.read(dataset)
    encoder = ItemEncoder(config.model, features, ItemText())
    weights = torch.randn(5, config.model.width)
    items = torch.tensor([3, 7, 3, 3, 9])
    (encoder(items) * weights).sum().backward()
    repeated = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    encoder.zero_grad()
    distinct, positions = torch.unique(items, return_inverse=True)
    (encoder(distinct)[positions] * weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, repeated[name], rtol=1e-5, atol=1e-6)


def test_an_item_that_training_never_saw_is_carried_by_its_features(config: Config, dataset: Dataset) -> None:
    features = ItemFeatures.read(dataset)
    cold = dataclasses.replace(features, train_count=features.train_count.clone())
    cold.train_count[3] = 0
    encoder = ItemEncoder(config.model, cold, ItemText()).eval()
    before = encoder(torch.tensor([3, 4]))
    with torch.no_grad():
        encoder.sources["id"].weight.normal_()
    after = encoder(torch.tensor([3, 4]))
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert before[0].abs().sum() > 0


def test_categories_are_the_mean_of_the_items_own(config: Config, dataset: Dataset) -> None:
    features = ItemFeatures.read(dataset)
    encoder = ItemEncoder(config.model, features, ItemText()).eval()
    table = encoder.sources["categories"].weight
    for item in range(1, features.num_items + 1):
        own = [category for category in features.categories[item].tolist() if category]
        present, vector = encoder._encode_source("categories", torch.tensor([item]))
        assert bool(present) == bool(own)
        torch.testing.assert_close(vector[0], table[own].mean(0) if own else torch.zeros(config.model.width))


def test_padding_is_a_zero_vector(config: Config, dataset: Dataset) -> None:
    encoder = ItemEncoder(config.model, ItemFeatures.read(dataset), ItemText())
    assert encoder(torch.tensor([0])).abs().sum() == 0


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_text_modes_train_what_they_say(config: Config, dataset: Dataset, batch: Batch, mode: str) -> None:
    texted = config.with_values({"model.text.mode": mode, "model.text.backbone": "tiny", "model.text.max_tokens": 16})
    model = build_recommender(texted, dataset, torch.device("cpu"))
    sum(model(batch).values()).backward()
    trained = {name for name, parameter in model.named_parameters() if "backbone" in name and parameter.grad is not None}
    all_of_backbone = {name for name, _ in model.named_parameters() if "backbone" in name}
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "sources.text" in name)
    if mode == "frozen":
        assert not all_of_backbone
    elif mode == "lora":
        assert trained
        assert all("lora_" in name for name in trained)
    else:
        assert trained == all_of_backbone


@pytest.mark.parametrize(("pooling", "mode"), [("last", "lora"), ("last", "full"), ("mean", "frozen")])
def test_a_decoder_from_a_folder_is_a_backbone(
    config: Config, dataset: Dataset, batch: Batch, tmp_path: Path, pooling: str, mode: str
) -> None:
    tokenizer = _train_tokenizer(ItemFeatures.read(dataset).texts)
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    values = {"model.text.mode": mode, "model.text.backbone": str(tmp_path), "model.text.pooling": pooling}
    model = build_recommender(config.with_values(values), dataset, torch.device("cpu")).eval()
    assert all(bool(loss.isfinite()) for loss in model(batch).values())
    if mode != "frozen":
        items = torch.tensor([1, 2])
        together, alone = model.item_encoder._text(items), model.item_encoder._text(items[:1])
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_the_tiny_tokenizer_is_the_same_in_every_process() -> None:
    program = """
from recsys.model.text_encoder import _train_tokenizer
print(sorted(_train_tokenizer(tuple(f'Story {n}. A tale about the number {n} of many' for n in range(200))).get_vocab().items()))
"""
    printed = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(printed) == 1


def test_frozen_vectors_are_computed_once_and_equal_the_trained_encoder_at_its_start(config: Config, dataset: Dataset) -> None:
    values = {"model.text.backbone": "tiny", "model.text.max_tokens": 16}
    frozen = build_recommender(config.with_values({**values, "model.text.mode": "frozen"}), dataset, torch.device("cpu"))
    stored = [found.uri for found in dataset.storage.list(f"{dataset.uri}/text_vectors")]
    build_recommender(config.with_values({**values, "model.text.mode": "frozen"}), dataset, torch.device("cpu"))
    assert [found.uri for found in dataset.storage.list(f"{dataset.uri}/text_vectors")] == stored
    full = build_recommender(config.with_values({**values, "model.text.mode": "full"}), dataset, torch.device("cpu")).eval()
    items = torch.tensor([1, 2, 30])
    torch.testing.assert_close(full.item_encoder._text(items), frozen.item_encoder.text_vectors[items], rtol=1e-4, atol=1e-5)
