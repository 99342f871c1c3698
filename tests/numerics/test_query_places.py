"""Queries in the model: attention, equal results in training and serving, and a model that learns to use them."""

import html
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recsys.config import Config, load_config
from recsys.config.evaluation import EvaluationConfig
from recsys.data.batch import Batch, Collator
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.data.text.queries import EVALUATION_VARIANT, QueryDraws, QueryTexts, drop_words, read_queries
from recsys.errors import UserError
from recsys.evaluation.evaluator import MADE_PROTOCOL, TYPED_PROTOCOL, evaluate
from recsys.exports.files import load_export, write_export
from recsys.model.recommender import Recommender, build_recommender
from recsys.objectives.next_item import NextItem
from recsys.report.evaluation import evaluation_page
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from tests.datasets import features_of, make_dataset
from tests.distributed import run_distributed
from tests.exports import users_of
from tests.reporters import LocalReporter

CPU = torch.device("cpu")
NOTHING = (torch.zeros(0, dtype=torch.long), torch.zeros(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("queries")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return make_dataset(Storage(str(folder / "store")))


@pytest.fixture(scope="module")
def config(folder: Path, dataset: Dataset) -> Config:
    values = {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "data.dataset": dataset.uri,
        "data.max_history": 10,
        "model.width": 16,
        "model.query_rate": 0.999,
        "model.text.backbone": "tiny",
        "model.text.max_tokens": 16,
    }
    return load_config().with_values(values)


def rows_and_batch(dataset: Dataset, recommender: Recommender) -> tuple[Sequences, Batch]:
    rows = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 12), sample_id=np.arange(12))
    draws = QueryDraws(0.999, 1, recommender.catalogue.has_text)
    return rows, Collator(dataset.manifest, True, queries=draws)(rows, *NOTHING)


def start_with_large_weights(config: Config, dataset: Dataset) -> Recommender:
    model = build_recommender(config, dataset, CPU).eval()
    for parameter in model.user_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("attention", "positions"), [("softmax", "learned"), ("ligr", "rotary"), ("hstu", "learned")])
def test_a_query_sees_its_history_and_nobody_else_sees_the_query(config: Config, dataset: Dataset, attention: str, positions: str) -> None:
    shaped = config.with_values({"model.attention": attention, "model.positions": positions})
    model = start_with_large_weights(shaped, dataset)
    rows, batch = rows_and_batch(dataset, model)
    places = batch.histories.query_places
    assert places is not None
    assert max(length for _, length in batch.histories.groups) == 11  # a query after a full history
    vectors = F.embedding(batch.histories.items, model.item_encoder(batch.items))
    queries = torch.randn(len(places), 16)
    before = model.user_encoder(vectors, batch.histories, queries)
    other = model.user_encoder(vectors, batch.histories, queries + torch.randn(len(places), 16))
    is_same = torch.isclose(before, other, rtol=1e-4, atol=1e-5).all(-1)
    assert not is_same[places].any()
    is_same[places] = True
    real = batch.histories.events > 0
    assert is_same[real].all()
    asked = QueryDraws(0.999, 1, model.catalogue.has_text)(rows, 0)
    place = int(places[0])
    first = place - (int(rows.lengths[asked.samples[0]]) - 1)
    assert first < place
    changed = vectors.clone()
    changed[first] += torch.randn(16)
    assert not torch.isclose(model.user_encoder(changed, batch.histories, queries)[place], before[place], rtol=1e-4, atol=1e-5).all()


@pytest.mark.parametrize("mode", ["frozen", "lora"])
@pytest.mark.parametrize("has_queries", [False, True])
def test_what_training_computes_at_a_query_is_what_is_answered(config: Config, folder: Path, mode: str, has_queries: bool) -> None:
    dataset = make_dataset(Storage(config.storage.root), has_queries=has_queries)
    shaped = config.with_values({"data.dataset": dataset.uri, "model.text.mode": mode, "model.attention": "hstu"})
    model = start_with_large_weights(shaped, dataset)
    predictor = build_predictor(shaped, dataset, model)
    rows, batch = rows_and_batch(dataset, model)
    asked = QueryDraws(0.999, 1, model.catalogue.has_text)(rows, 0)
    cut_lengths = np.append(asked.targets[: asked.num_whole], asked.cut_lengths)
    assert (cut_lengths == 0).any()  # some queries have an empty history
    assert has_queries == bool((asked.targets < rows.lengths[asked.samples] - 1).any())
    texts = QueryTexts(model.catalogue.texts, read_queries(dataset, Path(config.run.scratch)))
    expected = 0.0
    for number, (row, text) in enumerate(zip(asked.samples.tolist(), asked.texts.tolist(), strict=True)):
        begin, end = rows.starts[row], rows.starts[row] + cut_lengths[number]
        history = Sequences.of(*(rows.columns[name][begin:end].astype(kind) for name, kind in COLUMNS.items()))
        scores = predictor.score_catalogue([history], [texts[text]])[0]
        target = int(rows.columns["items"][begin + asked.targets[number]])
        expected += F.cross_entropy(scores[1:], torch.tensor(target - 1)).item()
    with torch.no_grad():
        whole = model(batch)["retrieval"]
        plain = model(replace(batch, target_places=batch.target_places[: -len(asked.samples)], **plain_targets(batch, len(asked.samples))))
    assert (whole - plain["retrieval"]).item() == pytest.approx(expected, rel=1e-4)


COLUMNS: dict[str, Any] = {"items": np.int64, "events": np.int64, "timestamps": np.int64, "values": np.float32}


def plain_targets(batch: Batch, num_queries: int) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name)[:-num_queries] for name in ("targets", "target_weights", "labels", "label_mask", "group_mask")}


@pytest.mark.parametrize("has_queries", [False, True])
def test_a_catalogue_without_text_has_no_queries(config: Config, has_queries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(Storage(config.storage.root), has_queries=has_queries)
    table = dataset.catalogue
    without = table.set_column(table.schema.get_field_index("text"), "text", [[""] * len(table)])
    features = features_of(without, len(dataset.manifest.category_vocabulary))
    monkeypatch.setattr(ItemFeatures, "read", lambda *_: features)
    with pytest.raises(UserError, match=r"model.query_rate = 0.999: the catalogue has no text"):
        build_recommender(config, dataset, CPU)


def run_of(config: Config, name: str, **values: object) -> Config:
    run = {
        "run.name": name,
        "model.dropout": 0.0,
        "training.num_workers": 1,
        "training.global_batch_size": 32,
        "training.micro_batch_size": 16,
        "training.early_stopping_patience": None,
    }
    return config.with_values({**run, **{key.replace("__", "."): value for key, value in values.items()}})


def train_it(config: Config) -> tuple[int, list[float]]:
    reporter = LocalReporter()
    state = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    return state.step, [losses["retrieval"] for losses in reporter.losses]


def load_last(config: Config, steps: int) -> tuple[Config, Dataset, Recommender]:
    storage = Storage.from_config(config.storage)
    uri = CheckpointStore(storage, config, Dataset.open(storage, config.data.dataset)).uri(steps)
    return load_trained(storage, uri, config.run.scratch)[1:]


@pytest.mark.parametrize("has_queries", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_losses_are_the_same_on_two_ranks(config: Config, has_queries: bool) -> None:
    data = {"data__dataset": make_dataset(Storage(config.storage.root), has_queries=has_queries).uri, "training__max_steps": 6}
    one = run_of(config, f"one-{has_queries}", training__zero_stage=0, **data)
    two = run_of(config, f"two-{has_queries}", training__zero_stage=3, training__num_workers=2, training__micro_batch_size=8, **data)
    (_, expected), (_, losses) = (run_distributed(train_it, run.training.num_workers, run)[0] for run in (one, two))
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_trained_model_finds_what_is_asked_for(config: Config) -> None:
    data = make_dataset(Storage(config.storage.root), num_users=300, num_items=100)
    values = {"model.width": 32, "model.use_ids": False, "model.use_features": False, "optimizer.learning_rate": 1e-2}
    run = run_of(config.with_values(values), "asked", data__dataset=data.uri, training__epochs=25, training__micro_batch_size=32)
    trained, dataset, model = load_last(run, run_distributed(train_it, 1, run)[0][0])
    predictor = build_predictor(trained, dataset, model)
    found = evaluate(predictor, dataset, EvaluationConfig())
    queries = found["queries"]
    assert queries["num_users"] == found["num_users"]
    assert queries["without_query"] == {name: found["metrics"][name] for name in queries["without_query"]}
    assert queries["with_query"]["ndcg@10"] > queries["without_query"]["ndcg@10"] + 0.08
    page = evaluation_page({"checkpoint": "one", "metric": "ndcg@10", **found})
    assert MADE_PROTOCOL[1:] in html.unescape(page)
    assert f"{queries['with_query']['ndcg@10']:.4f}" in page
    asked = [drop_words(text, item, EVALUATION_VARIANT) for item, text in enumerate(predictor.catalogue.texts)][1:]
    scores = predictor.score_catalogue([Sequences.of([])] * 100, asked).numpy()[:, 1:]
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    assert np.median(ranks) <= 5  # of 100 items, with words that training did not use and an empty history


def test_what_users_typed_is_learned_and_evaluated(config: Config) -> None:
    """The words of a query occur in no item's text, so the model can learn their meaning only from the events."""
    data = make_dataset(Storage(config.storage.root), num_users=300, num_items=30, has_queries=True)
    values = {"model.width": 32, "optimizer.learning_rate": 1e-2, "model.text.mode": "full", "optimizer.backbone_learning_rate": 1e-2}
    run = run_of(config.with_values(values), "typed", data__dataset=data.uri, training__epochs=15, training__micro_batch_size=32)
    trained, dataset, model = load_last(run, run_distributed(train_it, 1, run)[0][0])
    found = evaluate(build_predictor(trained, dataset, model), dataset, EvaluationConfig())
    queries = found["queries"]
    assert queries["protocol"] == TYPED_PROTOCOL
    assert 0 < queries["num_users"] < found["num_users"]  # one target in three has no query
    assert queries["with_query"]["ndcg@10"] > queries["without_query"]["ndcg@10"] + 0.2


@pytest.fixture(scope="module", params=["frozen", "lora", pytest.param("full", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, config: Config) -> tuple[Config, Dataset, Recommender]:
    mode = {"model.text.mode": request.param, "optimizer.learning_rate": 1e-2, "optimizer.backbone_learning_rate": 1e-2}
    run = run_of(
        config.with_values(mode),
        request.param,
        training__max_steps=4,
        training__zero_stage=3,
        training__num_workers=2,
        training__micro_batch_size=8,
    )
    return load_last(run, run_distributed(train_it, 2, run)[0][0])


def test_an_export_answers_queries_as_the_model_did(trained: tuple[Config, Dataset, Recommender], tmp_path: Path) -> None:
    config, dataset, model = trained
    predictor = build_predictor(config, dataset, model)
    write_export(predictor, model.state_dict(), dataset, tmp_path, num_golden=3)
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors", ".parquet", ".arrow", ".txt", ".jinja"}
    loaded = load_export(tmp_path).predictor
    histories = [*users_of(dataset).values(), Sequences.of([])]
    queries = [None if number % 3 == 0 else f"Story {number} drama" for number in range(len(histories) - 1)] + ["comedy"]
    expected = predictor.score_catalogue(histories, queries)
    torch.testing.assert_close(loaded.score_catalogue(histories, queries), expected, rtol=1e-5, atol=1e-5)
    plain = predictor.score_catalogue(histories)
    is_same = torch.isclose(plain, expected, rtol=1e-4, atol=1e-5).all(1)
    assert is_same.tolist() == [query is None for query in queries]
