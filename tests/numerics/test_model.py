"""The model: causal, independent of padding; features represent cold items; each distinct item is encoded once."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from recsys.config import Config, load_config
from recsys.data.batch import Batch, Collator, PackedHistories, map_tensors
from recsys.data.draws import NegativeSampler
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.recommender import Recommender, build_recommender
from recsys.model.text.encoder import _train_tokenizer
from recsys.model.user_encoder import Attention, _gaps, rotate, time_buckets
from recsys.store import Storage
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
    return Collator(dataset.manifest, takes_whole_catalogue=True)(Sequences.from_table(rows, sample_id=np.arange(8)), empty, torch.zeros(0))


def states(model: Recommender, batch: Batch) -> torch.Tensor:
    return model.user_encoder(model.item_encoder(batch.items)[batch.histories.items], batch.histories)


KINDS = [("softmax", "learned"), ("ligr", "rotary"), ("hstu", "none"), ("hstu", "learned")]


@pytest.mark.parametrize(("attention", "positions"), KINDS)
def test_a_place_sees_its_own_history_up_to_itself(config: Config, dataset: Dataset, batch: Batch, attention: str, positions: str) -> None:
    shaped = config.with_values({"model.attention": attention, "model.positions": positions})
    model = build_recommender(shaped, dataset, torch.device("cpu")).eval()
    for parameter in model.user_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before = states(model, batch)
    number, length = batch.histories.groups[-1]
    begin = len(before) - number * length  # start of the first history of the last group
    changed = map_tensors(batch.histories, torch.clone)
    for column, value in (("items", 1), ("events", 1), ("times", 10**9), ("values", 1.0)):
        getattr(changed, column)[begin + 2] = value
    after = states(model, dataclasses.replace(batch, histories=changed))
    is_same = torch.isclose(before, after, rtol=1e-4, atol=1e-5).all(-1)
    assert is_same[: begin + 2].all()
    assert not is_same[begin + 2 : begin + length].any()
    assert is_same[begin + length :].all()


@pytest.mark.parametrize(("attention", "positions"), KINDS)
def test_how_histories_are_grouped_changes_no_loss(config: Config, dataset: Dataset, attention: str, positions: str) -> None:
    shaped = config.with_values({"model.attention": attention, "model.positions": positions})
    model = build_recommender(shaped, dataset, torch.device("cpu")).eval()
    rows = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 8), sample_id=np.arange(8))
    empty = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    together, apart = (Collator(dataset.manifest, True, cost)(rows, *empty) for cost in (10_000, 0))
    assert len(together.histories.groups) == 1 < len(apart.histories.groups)
    expected = model(apart)
    for name, loss in model(together).items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-4)


def test_attention_is_that_of_each_history_alone(config: Config, dataset: Dataset, batch: Batch) -> None:
    attention = Attention(config, num_places=config.data.max_history, has_time=False)
    inputs = torch.randn(len(batch.histories.items), config.model.width)
    outputs = attention(inputs, batch.histories)
    begin = 0
    for number, length in batch.histories.groups:
        for _ in range(number):
            query, key, value = (
                part.view(length, config.model.num_heads, -1).transpose(0, 1)
                for part in attention.qkv(inputs[begin : begin + length]).chunk(3, -1)
            )
            mask = torch.ones(length, length).tril().log()
            weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + mask).softmax(-1)
            expected = attention.out((weights @ value).transpose(0, 1).flatten(1))
            torch.testing.assert_close(outputs[begin : begin + length], expected, rtol=1e-4, atol=1e-5)
            begin += length
    assert begin == len(outputs)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 9, 6).expand(12, 9, 6), torch.randn(1, 9, 6).expand(12, 9, 6)
    scores = rotate(query[:, :1].expand(12, 9, 6)) @ rotate(key[:, :1].expand(12, 9, 6)).transpose(1, 2)
    for distance in range(9):
        diagonal = scores[0].diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_times_apart_are_in_logarithmic_buckets_and_never_negative() -> None:
    assert time_buckets(torch.tensor([0, 1, 3, 4, -2, 2**40])).tolist() == [0, 1, 2, 2, 0, 31]


def test_gaps_begin_anew_with_each_history() -> None:
    times = torch.tensor([7, 3, 9, 50, 51, 0])
    nothing = torch.zeros(6)
    histories = PackedHistories(nothing, nothing, times, nothing, ((1, 1), (1, 2), (1, 3)))
    assert _gaps(histories).tolist() == [0, 0, 6, 0, 1, -51]


@pytest.mark.parametrize(
    "values",
    [
        {"model.loss.kind": "sampled", "model.loss.negatives": "in_batch"},
        {"model.loss.kind": "infonce", "model.loss.temperature": 0.5},
        {"model.loss.kind": "gbce", "model.loss.num_negatives": 8},
    ],
)
def test_every_loss_is_learned_from_the_distinct_items_of_a_batch(config: Config, dataset: Dataset, values: dict[str, object]) -> None:
    shaped = config.with_values(values)
    model = build_recommender(shaped, dataset, torch.device("cpu"))
    rows = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 8), sample_id=np.arange(8))
    drawn = NegativeSampler(ItemFeatures.read(dataset), shaped).draw(0, 0)
    batch = Collator(dataset.manifest, takes_whole_catalogue=False)(rows, *drawn)
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        loss = model(batch)["retrieval"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[0])
    assert losses[-1] < 0.8 * losses[0]


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


@pytest.mark.parametrize(
    ("values", "is_negative"), [({"model.id_dropout": 0.3}, False), ({"model.use_ids": False}, False), ({"model.id_dropout": 0.0}, True)]
)
def test_an_item_that_training_never_saw_is_a_negative_where_nothing_else_bounds_its_score(
    config: Config, dataset: Dataset, batch: Batch, values: dict[str, object], is_negative: bool
) -> None:
    features = ItemFeatures.read(dataset)
    seen = torch.cat([batch.targets, batch.histories.items]).unique()
    trained = seen[seen > 0]
    cold = dataclasses.replace(features, train_count=torch.zeros_like(features.train_count).index_fill(0, trained, 1))
    model = Recommender(config.with_values(values), dataset, cold, ItemText()).eval()
    assert 10 < len(trained) < dataset.manifest.num_items
    compared = torch.arange(1, dataset.manifest.num_items + 1) if is_negative else trained
    scores = states(model, batch)[batch.target_places] @ model.item_encoder()[compared].T
    expected = torch.nn.functional.cross_entropy(scores, torch.searchsorted(compared, batch.targets), reduction="sum")
    torch.testing.assert_close(model(batch)["retrieval"], expected, rtol=1e-5, atol=1e-5)


def test_padding_gets_no_gradient_from_the_full_loss(config: Config, dataset: Dataset, batch: Batch) -> None:
    model = build_recommender(config, dataset, torch.device("cpu"))
    items, users = model.item_encoder().detach().requires_grad_(), torch.randn(len(batch.targets), config.model.width)
    model._retrieval_loss(batch, users, items[batch.targets], items, torch.ones(len(users)))[0].backward()
    assert items.grad is not None
    assert items.grad[0].abs().sum() == 0
    assert items.grad[1:].abs().sum() > 0


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
from recsys.model.text.encoder import _train_tokenizer
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
