"""The item encoder: sources and gate, ids that training never saw, and memory-mapped catalogue files."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from recsys.config import Config, load_config
from recsys.config.model import ModelConfig
from recsys.data.batch import Batch
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.model.item_encoder import HashedIds, ItemEncoder, ItemText
from recsys.model.recommender import Recommender, build_recommender
from recsys.model.text.encoder import TextEncoder
from recsys.schema import CATALOGUE_SCHEMA
from recsys.store import Storage
from recsys.train.engine import Engine
from tests.datasets import features_of, make_dataset
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
        engine.update()
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
    assert names >= ({"tokens"} if text == "lora" else {"text_vectors"})
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
        *(None if buffer is None else buffer.clone() for buffer in (mapped.text_vectors, mapped.tokens)),
        mapped.token_counts.clone(),
        mapped.text_encoder,
    )
    copied = ItemEncoder(config.model, ItemFeatures.read(dataset), text).eval()
    copied.load_state_dict(mapped.state_dict())
    items = torch.from_numpy(np.arange(41))
    torch.testing.assert_close(copied(items), mapped(items), rtol=0, atol=0)


ROWS = [
    {"text": "has all", "categories": [1, 4, 5], "numbers": [0.5, float("nan")], "vector": [1.0, 0.0, -1.0], "train_count": 9},
    {"text": "a cold one", "categories": [2], "numbers": [0.1, 0.2], "vector": [0.3, 0.1, 0.2], "train_count": 0},
    {"text": None, "categories": [], "numbers": [float("nan")] * 2, "vector": None, "train_count": 4},
    {"text": "no graph, no vector", "categories": [], "numbers": [0.0, float("nan")], "vector": None, "train_count": 3},
    {"text": None, "categories": [3, 3], "numbers": [float("nan")] * 2, "vector": [0.0, 2.0, 0.0], "train_count": 0},
]
COLD, KNOWN_BY_ID_ALONE = 2, 3
TOKENS = torch.tensor([[0] * 6, [5, 6, 0, 0, 0, 0], [7, 8, 9, 1, 0, 0], [0] * 6, [4, 3, 2, 1, 5, 6], [0] * 6], dtype=torch.int32)
LENGTHS = torch.tensor([1, 2, 4, 1, 6, 1], dtype=torch.int32)


@pytest.fixture
def features() -> ItemFeatures:
    """Return five items with different missing attributes; an item can have several categories, as in a knowledge graph."""
    rows = [{"item_index": index, "item_id": f"item-{index}", "title": "", **row} for index, row in enumerate(ROWS, start=1)]
    return features_of(pa.Table.from_pylist(rows, CATALOGUE_SCHEMA), num_categories=5)


def frozen_text() -> ItemText:
    return ItemText(vectors=torch.randn(6, 7, generator=torch.Generator().manual_seed(3)))


def trained_text() -> ItemText:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = BertModel(BertConfig(vocab_size=10, **shape), add_pooling_layer=False)
    return ItemText(tokens=TOKENS, lengths=LENGTHS, encoder=TextEncoder(backbone, "mean"))


def build(features: ItemFeatures, text: ItemText, **values: object) -> ItemEncoder:
    torch.manual_seed(1)
    encoder = ItemEncoder(ModelConfig.model_validate({"width": 8, **values}), features, text)
    for parameter in encoder.gates.parameters():
        torch.nn.init.normal_(parameter)
    return encoder.eval()


def plain_vector(encoder: ItemEncoder, features: ItemFeatures, text: ItemText, item: int) -> torch.Tensor:
    """Encode one item by the documented formulas."""

    def project(name: str, values: torch.Tensor) -> torch.Tensor:
        linear, scale = encoder.sources[name].linear, encoder.sources[name].scale
        projected = linear.weight @ values + linear.bias
        return (projected - projected.mean()) / (projected.var(unbiased=False) + 1e-5).sqrt() * scale

    row, parts = ROWS[item - 1], {}
    if row["train_count"]:
        parts["id"] = encoder.sources["id"].weight[item]
    if row["text"]:
        parts["text"] = project("text", text.vectors[item])
    if row["categories"]:
        parts["categories"] = torch.stack([encoder.sources["categories"].weight[category] for category in row["categories"]]).mean(0)
    if not np.isnan(row["numbers"]).all():
        parts["numbers"] = project("numbers", torch.cat([features.numbers[item], features.has_number[item].float()]))
    if row["vector"]:
        parts["vector"] = project("vector", torch.tensor(row["vector"]))
    names = list(encoder.sources)
    logits = sum(encoder.gates[name](parts[name]) if name in parts else encoder.gates[name].bias for name in names)
    weights = torch.stack([logits[names.index(name)] for name in parts]).softmax(0)
    return sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))


def test_vectors_are_the_gated_sum_of_what_an_item_has(features: ItemFeatures) -> None:
    text = frozen_text()
    encoder = build(features, text)
    assert list(encoder.sources) == ["id", "text", "categories", "numbers", "vector"]
    vectors = encoder(torch.tensor([0, 1, 2, 3, 4, 5]))
    assert vectors[0].abs().sum() == 0
    for item in range(1, 6):
        torch.testing.assert_close(vectors[item], plain_vector(encoder, features, text, item), msg=f"item {item}")


@pytest.mark.parametrize("text", [ItemText(), frozen_text(), trained_text()], ids=["off", "frozen", "full"])
@pytest.mark.parametrize("id_buckets", [0, 3])
def test_the_whole_catalogue_is_that_of_its_items_in_order(features: ItemFeatures, text: ItemText, id_buckets: int) -> None:
    encoder = build(features, text, id_buckets=id_buckets)
    results = []
    for items in (None, torch.arange(6)):
        encoder.zero_grad()
        vectors = encoder(items)
        (vectors * torch.arange(48.0).view(6, 8)).sum().backward()
        results.append((vectors, *(parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None)))
    for whole, gathered in zip(*results, strict=True):
        torch.testing.assert_close(whole, gathered)


def test_an_only_source_stands_for_itself(features: ItemFeatures) -> None:
    encoder = build(features, ItemText(), use_features=False)
    assert set(encoder.state_dict()) == {"sources.id.weight"}
    seen = torch.tensor([False, True, False, True, True, False])
    torch.testing.assert_close(encoder(), encoder.sources["id"].weight * seen.unsqueeze(1))


@pytest.mark.parametrize("id_buckets", [0, 3])
def test_the_id_of_a_cold_item_says_nothing(features: ItemFeatures, id_buckets: int) -> None:
    encoder = build(features, frozen_text(), id_buckets=id_buckets)
    [gradient] = torch.autograd.grad(encoder(torch.tensor([COLD])).sum(), encoder.sources["id"].weight)
    assert gradient.abs().sum() == 0
    [gradient] = torch.autograd.grad(encoder(torch.tensor([1])).sum(), encoder.sources["id"].weight)
    assert gradient.abs().sum() > 0


def test_id_dropout_makes_an_item_look_cold_while_training(features: ItemFeatures) -> None:
    encoder = build(features, frozen_text(), id_dropout=0.3).train()
    warm, as_cold = encoder.eval()(torch.tensor([1])), build(never_seen(features), frozen_text())(torch.tensor([1]))
    drawn = encoder.train()(torch.ones(2000, dtype=torch.long))
    is_dropped = torch.isclose(drawn, as_cold).all(1)
    assert bool((is_dropped | torch.isclose(drawn, warm).all(1)).all())
    assert 0.25 < is_dropped.float().mean() < 0.35


def test_the_id_of_an_item_that_has_nothing_else_is_not_dropped(features: ItemFeatures) -> None:
    encoder = build(features, frozen_text(), id_dropout=0.9)
    items = torch.full((50,), KNOWN_BY_ID_ALONE)
    torch.testing.assert_close(encoder.train()(items), encoder.eval()(items))
    alone = build(features, ItemText(), use_features=False, id_dropout=0.9)
    torch.testing.assert_close(alone.train()(), alone.eval()())


def never_seen(features: ItemFeatures) -> ItemFeatures:
    return dataclasses.replace(features, train_count=torch.zeros_like(features.train_count))


def test_like_lengths_are_encoded_together_and_give_the_same(features: ItemFeatures) -> None:
    text = trained_text()
    encoder = build(features, text)
    items = torch.tensor([4, 1, 3, 2, 0, 4])
    shapes = []
    hook = text.encoder.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    grouped = encoder._text(items)
    hook.remove()
    assert shapes == [(2, 1), (1, 2), (1, 4), (2, 6)]
    mask = torch.arange(6) < LENGTHS[items].unsqueeze(1)
    torch.testing.assert_close(grouped, text.encoder(TOKENS[items].long(), mask.long()), rtol=1e-5, atol=1e-6)


def test_the_language_model_runs_equally_often_for_any_items(features: ItemFeatures) -> None:
    text = trained_text()
    encoder = build(features, text)
    runs = []
    text.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    assert encoder._text(torch.tensor([0])).shape == (1, 16)
    assert len(runs) == 4


def test_hashed_ids_are_signed_sums_of_picked_rows() -> None:
    ids = HashedIds(1000, num_buckets=50, num_hashes=3, width=4)
    rows, signs = ids.pick(torch.arange(1001))
    vectors = ids(None)
    for item in (1, 7, 1000):
        expected = sum(float(sign) * ids.weight[row] for sign, row in zip(signs[item], rows[item], strict=True))
        torch.testing.assert_close(vectors[item], expected)


def test_so_many_hashed_ids_collide_as_their_page_says() -> None:
    num_items, num_buckets = 20_000, 1000
    rows, signs = HashedIds(num_items, num_buckets, num_hashes=2, width=4).pick(torch.arange(1, num_items + 1))
    picked = (2 * rows + (signs > 0)).sort(1).values
    _, counts = torch.unique(picked, dim=0, return_counts=True)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = num_items**2 * 2 / 2 / (2 * num_buckets) ** 2
    assert 0.7 * expected < pairs < 1.3 * expected
