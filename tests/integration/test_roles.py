"""A log of impressions with position bias, where what is shown is not what is wanted: roles against all events alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recsys.config import Config, load_config
from recsys.data.sequences import Sequences
from recsys.evaluation.significance import interval_95, resampled_means
from recsys.ingest.prepare import prepare
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from tests.checkpoints import store_of
from tests.datasets import open_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_ITEMS, NUM_GROUPS, SLATES, SLOTS, K = 300, 120, 6, 12, 8, 10


def world() -> tuple[np.ndarray, pd.DataFrame]:
    """Return each user's true preference for each item, and a log of slates that favour popular items at the top.

    Popularity has nothing to do with preference. The chance that a slot is looked at falls with its position.
    """
    generator = np.random.default_rng(0)
    groups, tastes = np.arange(NUM_ITEMS) % NUM_GROUPS, generator.integers(NUM_GROUPS, size=NUM_USERS)
    preference = np.where(groups == tastes[:, None], 0.7, 0.05) * generator.uniform(0.6, 1.0, NUM_ITEMS)
    popularity = (generator.permutation(NUM_ITEMS) + 3.0) ** -1.0
    rows: list[tuple[Any, ...]] = []
    for user in range(NUM_USERS):
        for slate in range(SLATES):
            time = 1_700_000_000 + slate * 86_400 + user
            chosen = generator.choice(NUM_ITEMS, SLOTS, replace=False, p=popularity / popularity.sum())
            for slot, item in enumerate(sorted(chosen, key=lambda item: -popularity[item])):
                rows.append((f"u{user}", f"i{item}", time, "impression", f"{user}-{slate}", slot + 1))
                if generator.random() < preference[user, item] / (slot + 1) ** 0.7:
                    rows.append((f"u{user}", f"i{item}", time + 1, "click", f"{user}-{slate}", None))
    return preference, pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event", "impression_id", "display_position"])


def train(config: Config) -> int | None:
    return Trainer(config, open_dataset(config), LocalReporter(), NextItem).run().best_step


def true_ndcg(folder: Path, log: pd.DataFrame, preference: np.ndarray, name: str, **data: Any) -> np.ndarray:
    """Train on the log; return each user's NDCG@10 by true preference over the items that the user has not clicked."""
    values = {
        "storage.root": str(folder / name),
        "run.scratch": str(folder / name / "scratch"),
        "run.name": name,
        "data.events": str(folder / "events.csv"),
        "data.max_history": 30,
        "model.width": 32,
        "model.text.mode": "off",
        "training.num_workers": 1,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 16,
        "training.epochs": 15,
        "training.early_stopping_patience": 4,
    }
    config = load_config().with_values(values | {f"data.{key}": value for key, value in data.items()})
    storage = Storage.from_config(config.storage)
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        dataset = prepare(config, storage)
    config = dataset.complete(config)
    best = run_distributed(train, 1, config)[0]
    _, trained, dataset, recommender = load_trained(storage, store_of(config).uri(best), config.run.scratch)
    predictor = build_predictor(trained, dataset, recommender)
    clicked = {user: set(own.item_id) for user, own in log[log.event == "click"].groupby("user_id")}
    numbers = np.array([int(item_id[1:]) for item_id in predictor.catalogue.item_ids[1:]])
    rows = Sequences.from_table(users := dataset.read_users())
    found = np.full(NUM_USERS, np.nan)
    for row, user in enumerate(users["user_id"].to_pylist()):
        if user not in clicked:
            continue
        history = Sequences.of(*(getattr(rows[row : row + 1], name) for name in ("items", "events", "timestamps", "values")))
        scores = predictor.score_catalogue([history]).numpy()[0, 1:]
        unseen = np.array([f"i{number}" not in clicked[user] for number in numbers])
        gains = preference[int(user[1:])][numbers[unseen]]
        discounts = 1 / np.log2(np.arange(2, K + 2))
        order = np.argsort(-scores[unseen], kind="stable")[:K]
        found[int(user[1:])] = gains[order] @ discounts / (np.sort(gains)[::-1][:K] @ discounts)
    return found


@pytest.mark.slow
def test_roles_find_what_users_want_and_not_what_they_were_shown(tmp_path: Path) -> None:
    preference, log = world()
    log.to_csv(tmp_path / "events.csv", index=False)
    with_roles = true_ndcg(tmp_path, log, preference, "roles")
    without = true_ndcg(tmp_path, log, preference, "alike", kinds={"impression": {"role": "positive"}})
    differences = (with_roles - without)[~np.isnan(with_roles)]
    low, high = interval_95(resampled_means(differences[:, None], np.random.default_rng(0)))
    print(
        f"NDCG@10 by true preference: {np.nanmean(with_roles):.3f} with roles, {np.nanmean(without):.3f} without: [{low:+.3f}, {high:+.3f}]"
    )
    assert low > 0
