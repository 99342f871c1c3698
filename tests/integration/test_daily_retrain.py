"""A day is appended, the model is trained again and exported: which version is in production; which epoch a metric chooses."""

from pathlib import Path

import numpy as np
import pytest

from jobs.export import CANDIDATE, PRODUCTION
from jobs.export import run as export
from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.launch.checks import check_training
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.checkpoints import store_of
from tests.datasets import make_dataset, open_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter
from tests.verbs import refusal_of
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_ITEMS, DAY = 200, 60, 86_400


def write_log(path: Path, first: int, last: int, seed: int) -> None:
    """Write an event a day for each user, who goes on from item to item, mostly to the next one."""
    generator = np.random.default_rng(seed)
    rows = ["user_id,item_id,timestamp"]
    for user in range(NUM_USERS):
        for day in range(first, last):
            jump = int(generator.integers(NUM_ITEMS)) if generator.random() < 0.2 else 0
            rows.append(f"u{user},i{(user * 7 + day + jump) % NUM_ITEMS},{1_700_000_000 + day * DAY + user}")
    path.write_text("\n".join(rows) + "\n")


def train(config: Config) -> TrainingState:
    return Trainer(config, open_dataset(config), LocalReporter(), NextItem).run()


def trained(config: Config) -> Config:
    """Train in a process of its own; return the config with the best checkpoint to export."""
    state = run_distributed(train, 1, config)[0]
    return config.with_values({"export.checkpoint": store_of(config).uri(state.best_step)})


def test_an_equal_retrain_goes_live_and_a_worse_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)
    storage = Storage(str(tmp_path / "store"))
    write_log(tmp_path / "before.csv", 0, 20, seed=0)
    write_log(tmp_path / "day.csv", 20, 22, seed=1)
    values = {"storage.root": storage.root, "run.scratch": str(tmp_path / "scratch"), "data.max_history": 10}
    before = prepare(load_config().with_values({**values, "data.events": str(tmp_path / "before.csv")}), storage)
    after = prepare(load_config().with_values({**values, "data.events": str(tmp_path / "day.csv"), "data.base": before.uri}), storage)

    def run(name: str, dataset: Dataset, **more: object) -> dict[str, object]:
        config = small_config(dataset, tmp_path, run__name=name, export__name="shop", training__epochs=4, **more)
        return export(trained(dataset.complete(config)))

    first = run("monday", before)
    assert (first["alias"], first["reason"]) == (PRODUCTION, "the first version")
    second = run("tuesday", after)
    assert second["alias"] == PRODUCTION
    assert f"on the validation users of {after.uri}" in str(second["reason"])
    worse = run("wednesday", after, optimizer__learning_rate=1e-9)
    assert worse["alias"] == CANDIDATE
    assert str(worse["reason"]).startswith("worse by ndcg@10")
    # A version trained on older data is still compared on the newest.
    late = run("late", before, training__seed=1)
    assert f"on the validation users of {after.uri}" in str(late["reason"])
    again = run("tuesday", after)
    assert again["version"] == second["version"]


def test_each_metric_chooses_its_own_epoch(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")), num_users=200)
    best = {}
    for metric, better in (("ndcg@10", max), ("rating.rmse", min), ("purchase.auc", max)):
        config = small_config(
            dataset,
            tmp_path,
            run__name=metric.partition("@")[0],
            evaluation__metric=metric,
            training__epochs=8,
            training__early_stopping_patience=None,
            model__ranker__task_weight=1.0,
            optimizer__learning_rate=0.01,
        )
        state = run_distributed(train, 1, config)[0]
        values = {epoch.step: epoch.validation for epoch in state.history}
        assert len(values) == 8
        best[metric] = state.best_step
        assert state.best_step == better(values, key=values.__getitem__)
    assert len({best["ndcg@10"], best["rating.rmse"]}) == len({best["ndcg@10"], best["purchase.auc"]}) == 2


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("click.auc", "the dataset has no task 'click'; its tasks: purchase, rating, like; ndcg@10 would work"),
        ("rating.auc", "'rating' is a regression task; rating.rmse would work"),
        ("like.rmse", "'like' is a binary task; like.auc would work"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_at_once(tmp_path: Path, metric: str, message: str) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    settings = (f"--set=storage.root={dataset.storage.root}", f"--set=data.dataset={dataset.uri}", f"--set=run.scratch={tmp_path}")
    line, seconds = refusal_of("jobs.train", *settings, f"--set=evaluation.metric={metric}")
    assert message in line
    assert seconds < 2


def test_labels_that_are_missing_or_all_equal_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)
    rows = [
        f"u{user},i{(user + step) % 9},{step},{4 if step < 3 else ''},{'buy' if step == 1 else 'view'}"
        for user in range(20)
        for step in range(6)
    ]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp,value,event\n" + "\n".join(rows) + "\n")
    storage = Storage(str(tmp_path / "store"))
    values = {"storage.root": storage.root, "data.events": str(tmp_path / "events.csv"), "data.event_kinds": ["view", "buy"]}
    dataset = prepare(load_config().with_values(values), storage)
    for metric, message in (
        ("rating.rmse", "no target has a value"),
        ("buy.auc", "all labels are equal"),
        ("buy.uauc", "no user has labels of both classes"),
    ):
        with pytest.raises(UserError, match=message):
            check_training(small_config(dataset, tmp_path, data__max_history=50, evaluation__metric=metric))
