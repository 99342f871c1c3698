"""A shop's log, where every purchase follows a view of the same item: what is evaluated, counted against plain pandas."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from recsys.config import Config, load_config
from recsys.config.evaluation import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.evaluator import evaluate
from recsys.evaluation.users import read_evaluation_users
from recsys.ingest.prepare import prepare
from recsys.model.recommender import build_recommender
from recsys.predictor import Predictor
from recsys.report.evaluation import evaluation_page
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.without_ray import patch_run_tasks, run_once

KINDS = ("view", "add_to_cart", "buy")
NUM_USERS, NUM_ITEMS, START, DAY = 80, 50, 1_700_000_000, 86_400
TEST_FROM = START + 24 * DAY


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    """Return chains of view, cart and buy; a buy may come days after the view."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(NUM_USERS):
        for _ in range(14):
            item, time = int(generator.integers(NUM_ITEMS)), START + int(generator.integers(28 * DAY))
            for kind in KINDS[: 1 + int(generator.integers(3))]:
                rows.append((f"u{user}", f"i{item}", time, kind))
                time += int(generator.choice([60, 3 * DAY]))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, log: pd.DataFrame) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shop")
    log.to_csv(folder / "events.csv", index=False)
    return {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "data.events": str(folder / "events.csv"),
        "data.event_kinds": list(KINDS),
        "data.split": "time",
        "data.validation_from": START + 20 * DAY,
        "data.test_from": TEST_FROM,
        "model.width": 16,
        "model.text.mode": "off",
    }


def prepared(settings: dict[str, Any], **more: Any) -> tuple[Config, Dataset]:
    config = load_config().with_values(settings | {f"data.{key}": value for key, value in more.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        return config, prepare(config, Storage.from_config(config.storage))


def predictor_of(config: Config, dataset: Dataset) -> Predictor:
    return build_predictor(config, dataset, build_recommender(config, dataset, torch.device("cpu")).eval())


def plain_counts(log: pd.DataFrame, target_events: tuple[str, ...], repeats: str) -> dict[str, int]:
    """Count the targets of the test split: user by user, row by row."""
    log = log.drop_duplicates().sort_values("timestamp", kind="stable")
    rank = {kind: number for number, kind in enumerate(KINDS)}
    counts = dict.fromkeys(("in_split", "other_kind", "no_history", "seen_before", "counted"), 0)
    for _, events in log.groupby("user_id"):
        before, later = events[events.timestamp < TEST_FROM], events[events.timestamp >= TEST_FROM]
        for row in later.itertuples():
            own = before[before.item_id == row.item_id]
            is_stronger = own.event.map(rank).max() < rank[row.event] if len(own) else True
            counts["in_split"] += 1
            if target_events and row.event not in target_events:
                counts["other_kind"] += 1
            elif not len(before):
                counts["no_history"] += 1
            elif len(own) and (repeats == "exclude" or (repeats == "new_kind" and not is_stronger)):
                counts["seen_before"] += 1
            else:
                counts["counted"] += 1
    return counts


@pytest.mark.parametrize("target_events", [(), ("buy",), ("add_to_cart", "buy")])
@pytest.mark.parametrize("repeats", ["exclude", "include", "new_kind"])
def test_what_counts_is_what_pandas_counts(
    settings: dict[str, Any], log: pd.DataFrame, target_events: tuple[str, ...], repeats: str
) -> None:
    config, dataset = prepared(settings)
    asked = EvaluationConfig(target_events=target_events, repeats=repeats)
    found = evaluate(predictor_of(config, dataset), dataset, asked)
    expected = plain_counts(log, target_events, repeats)
    assert {name: found["targets"].get(name, 0) for name in expected} == expected
    users = read_evaluation_users(dataset, "test", asked)
    assert sum(len(user.targets.items) for user in users) == expected["counted"] > 0
    assert found["num_users"] == len(users)


def test_metrics_stand_side_by_side_for_each_kind_of_target(settings: dict[str, Any]) -> None:
    config, dataset = prepared(settings)
    found = evaluate(predictor_of(config, dataset), dataset, EvaluationConfig(repeats="new_kind"))
    kinds = {name: each for name, each in found["slices"].items() if name.startswith("target kind ")}
    assert set(kinds) == {f"target kind {kind}" for kind in KINDS}
    assert all(each["num_users"] >= 10 and "ndcg@10" in each for each in kinds.values())
    page = evaluation_page({"checkpoint": "c", "metric": "ndcg@10", **found})
    assert "target kind buy" in page
    assert f"{found['targets']['seen_before']:,} on items that the user had seen" in page


def test_a_chain_is_collapsed_to_its_strongest_event(settings: dict[str, Any], log: pd.DataFrame) -> None:
    _, dataset = prepared(settings, collapse_seconds=3600)
    rank = {kind: number for number, kind in enumerate(KINDS)}
    kept = []
    for (user, item), events in log.drop_duplicates().sort_values("timestamp", kind="stable").groupby(["user_id", "item_id"]):
        chains = (events.timestamp.diff().fillna(0) > 3600).cumsum()
        for _, chain in events.groupby(chains):
            best = chain[chain.event.map(rank) == chain.event.map(rank).max()].iloc[-1]
            kept.append((user, item, int(best.timestamp), best.event))
    table = dataset.read_users(["user_id", "items", "timestamps", "events"])
    ids = dict(zip(dataset.catalogue["item_index"].to_pylist(), dataset.catalogue["item_id"].to_pylist(), strict=True))
    found = [
        (row["user_id"], ids[item], time, dataset.manifest.event_kinds[kind])
        for row in table.to_pylist()
        for item, time, kind in zip(row["items"], row["timestamps"], row["events"], strict=True)
    ]
    assert sorted(found) == sorted(kept)
    assert dataset.manifest.rejected["collapsed"] == len(log.drop_duplicates()) - len(kept) > 0


def test_a_target_kind_that_the_log_lacks_is_refused(settings: dict[str, Any]) -> None:
    config, dataset = prepared(settings)
    with pytest.raises(UserError, match=r"'sell' is not an event kind of the dataset's histories; known: view, add_to_cart, buy"):
        evaluate(predictor_of(config, dataset), dataset, EvaluationConfig(target_events=("sell",)))


def test_seen_items_come_back_after_their_time(settings: dict[str, Any], tmp_path: Path) -> None:
    _, dataset = prepared(settings, kinds={"view": {"seen_seconds": DAY}, "buy": {"marks_seen": False}})
    assert [(kind.name, kind.marks_seen, kind.seen_seconds) for kind in dataset.manifest.kinds] == [
        ("view", True, DAY),
        ("add_to_cart", True, None),
        ("buy", False, None),
    ]
    for user in read_evaluation_users(dataset, "test", EvaluationConfig()):
        now = user.targets.timestamps[0]
        rows = zip(user.history.items.tolist(), user.history.events.tolist(), user.history.timestamps.tolist(), strict=True)
        expected = {item for item, kind, time in rows if kind == 1 or (kind == 0 and now - time <= DAY)}
        assert set(user.seen.tolist()) == expected - set(user.targets.items.tolist())
        assert not expected & set(user.targets.items.tolist())
