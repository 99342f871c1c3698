"""The ranking tasks end to end: calibration of balanced labels, equal results with sharding, served scores equal offline scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.config.model import ModelConfig
from recsys.data.batch import CPU_GROUP_COST, pack
from recsys.data.labels.training import keep_negatives
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.exports.files import load_export, write_export
from recsys.model.ranker import Ranker, TaskLosses
from recsys.model.recommender import Recommender, build_recommender
from recsys.objectives.next_item import NextItem
from recsys.schema import Task
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from recsys.train.loop import Trainer
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.exports import users_of
from tests.reporters import LocalReporter

EVERYTHING = {
    "model.id_buckets": 24,
    "model.ranker.kind": "additive",
    "model.ranker.num_experts": 3,
    "model.ranker.weighting": "uncertainty",
    "model.ranker.imbalance": "sample",
    "model.ranker.negatives_per_positive": 0.5,
    "model.ranker.task_weight": 0.5,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("tasks") / "store")), num_users=200)


def config_of(dataset: Dataset, values: dict[str, object]) -> Config:
    root = Path(dataset.storage.root)
    common = {
        "storage.root": str(root),
        "run.scratch": str(root.parent / "scratch"),
        "data.dataset": dataset.uri,
        "data.max_history": 10,
        "model.width": 16,
        "model.dropout": 0.0,
        "model.text.backbone": "tiny",
        "model.text.max_tokens": 16,
    }
    return load_config().with_values(common | values)


@pytest.mark.parametrize(("imbalance", "rate"), [("none", 1.0), ("weight", 0.04), ("sample", 0.12)])
def test_balanced_training_gives_back_the_probabilities_of_the_data(imbalance: str, rate: float) -> None:
    """With labels drawn from logits linear in known vectors (4 % positives), each kind of training must recover the logits themselves."""
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(2, 30_000, 4, generator=generator)
    planted = items @ torch.tensor([1.0, -0.5, 0.5, 0.0]) - 3.8
    labels = (torch.rand(30_000, generator=generator) < planted.sigmoid()).float().unsqueeze(1)
    assert 0.03 < float(labels.mean()) < 0.05
    config = ModelConfig.model_validate({"width": 4, "ranker": {"imbalance": imbalance}})
    torch.manual_seed(0)
    rates = torch.tensor([rate])
    tasks = (Task("click", "binary"),)
    ranker, losses = Ranker(config, tasks, False, rates), TaskLosses(config.ranker, tasks, rates)
    mask = torch.ones_like(labels)
    if imbalance == "sample":
        mask = keep_negatives(labels, torch.arange(30_000), torch.zeros(30_000, dtype=torch.long), rates)
    optimizer = torch.optim.LBFGS(ranker.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = losses(ranker(users, items), labels, mask)["click"] / mask.sum() + 1e-3 * ranker.heads.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = ranker.calibrate(ranker(users, items)).detach().squeeze(1)
    assert float(found.sigmoid().mean()) == pytest.approx(float(labels.mean()), rel=0.1)
    assert float((found - planted).abs().mean()) < 0.25
    if imbalance != "none":
        assert float(ranker(users, items).detach().sigmoid().mean()) > 3 * float(labels.mean())


@pytest.mark.parametrize("kind", ["regression", pytest.param("additive", marks=pytest.mark.slow)])
def test_everything_at_once_is_learned_alike_by_sharded_ranks(dataset: Dataset, kind: str) -> None:
    values = EVERYTHING | {
        "model.ranker.kind": kind,
        "model.ranker.factor_dropout": 0.0,
        "model.text.mode": "frozen",
        "optimizer.learning_rate": 5e-3,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 8,
        "training.max_steps": 15,
        "training.early_stopping_patience": None,
    }
    build_recommender(config_of(dataset, values), dataset, torch.device("cpu"))
    curves = []
    for num_workers, zero_stage in ((1, 0), (2, 3)):
        own = {"run.name": f"tasks-{kind}-{zero_stage}", "training.num_workers": num_workers, "training.zero_stage": zero_stage}
        curves.append(run_distributed(train_and_record, num_workers, config_of(dataset, values | own))[0])
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4, atol=1e-6)
    assert not np.allclose(curves[0][:5].mean(0), curves[0][-5:].mean(0), rtol=0.05), "nothing was learned, so equal curves say little"


def train_and_record(config: Config) -> np.ndarray:
    reporter = LocalReporter()
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    return np.array([list(losses.values()) for losses in reporter.losses])


@pytest.mark.parametrize(
    ("kind", "text_mode"), [("additive", "off"), ("additive", "frozen"), ("additive", "full"), ("regression", "frozen")]
)
def test_a_served_score_is_the_offline_one_and_the_models_own(dataset: Dataset, tmp_path: Path, kind: str, text_mode: str) -> None:
    config = config_of(dataset, EVERYTHING | {"model.ranker.kind": kind, "model.text.mode": text_mode})
    recommender = build_recommender(config, dataset, torch.device("cpu")).eval()
    torch.manual_seed(5)
    for parameter in recommender.ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    offline = build_predictor(config, dataset, recommender)
    write_export(offline, recommender.state_dict(), dataset, tmp_path, num_golden=2)
    served = load_export(tmp_path).predictor
    histories = list(users_of(dataset).values())[:7]
    candidates = [np.arange(1 + index, 20 + index) for index in range(7)]
    expected, answered = offline.score(histories, candidates), served.score(histories, candidates)
    for user, (ours, theirs) in enumerate(zip(answered, expected, strict=True)):
        for name, scores in ours.items():
            np.testing.assert_array_equal(scores, theirs[name], err_msg=name)
        probabilities = score_by_model(recommender, histories[user], torch.from_numpy(candidates[user]))
        np.testing.assert_allclose(ours["purchase"], probabilities[:, 0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours["like"], probabilities[:, 2], rtol=1e-4, atol=1e-6)
    assert (served.text_vectors is None) == (kind == "regression" or text_mode == "off")
    assert bool((recommender.ranker.log_negative_rates[[0, 2]] < 0).all())


@torch.no_grad()
def score_by_model(recommender: Recommender, history: Sequences, items: torch.Tensor) -> np.ndarray:
    """Compute scores as in training, starting at the item encoder, with explicit calibration: p = q / (q + (1 - q) / w)."""
    recent = history.last(10)
    length = np.array([len(recent.items)])
    packed, _ = pack(recent, CPU_GROUP_COST)
    taken = recommender.item_encoder(packed.items)
    last = torch.from_numpy(length - 1)
    user = recommender.ranker.read_users(recommender.user_encoder(taken, packed)[last], taken, packed, last)
    vectors, texts = recommender.item_encoder.with_text(items)
    seen = recommender.ranker(user.expand(len(items), -1), vectors, texts).sigmoid()
    rates = recommender.ranker.log_negative_rates.exp()
    return (seen / (seen + (1 - seen) / rates)).numpy()
