"""Exposures from raw events to batches and scores, against plain references."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from recsys.config import Config, load_config
from recsys.data.batch import Collator
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences, cut_windows
from recsys.errors import UserError
from recsys.evaluation.decisions.promotion import compare_versions
from recsys.evaluation.evaluator import evaluate
from recsys.evaluation.exposures import ExposedTargets
from recsys.ingest.prepare import prepare
from recsys.model.recommender import build_recommender
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.unit.ingest.write.test_statistics_passes import read_rows
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_ITEMS, START, DAY = 40, 30, 1_700_000_000, 86_400
WINDOW = 3600
NOTHING = torch.zeros(0, dtype=torch.long), torch.zeros(0)
SPLITS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "time": {"split": "time", "validation_from": START + 6 * DAY, "test_from": START + 8 * DAY},
    "random": {"split": "random"},
    "column": {"split": "column", "columns": {"split": "part"}},
}


def shown_log() -> pd.DataFrame:
    """Return impressions, and for some of them a click and a purchase minutes to hours later; half of them name their impression."""
    generator = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for number in range(1200):
        user, item, time = (
            f"u{generator.integers(NUM_USERS)}",
            f"i{generator.integers(NUM_ITEMS)}",
            START + int(generator.integers(10 * DAY)),
        )
        part = ("train", "valid", "test")[int(generator.choice(3, p=[0.7, 0.1, 0.2]))]
        named = f"s{number}" if number % 2 else None
        rows.append((user, item, time, "impression", named, int(generator.integers(1, 8)), part))
        for kind, rate in (("click", 0.4), ("purchase", 0.3)):
            if generator.random() > rate:
                break
            time += int(generator.choice([0, 60, 2 * WINDOW]))
            rows.append((user, item, time, kind, named, None, part))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event", "impression_id", "display_position", "part"])


def prepared(folder: Path, log: pd.DataFrame, **data: Any) -> tuple[Config, Dataset]:
    log.to_csv(folder / "events.csv", index=False)
    values = {"storage.root": str(folder / "store"), "run.scratch": str(folder / "scratch"), "data.events": str(folder / "events.csv")}
    values |= {"data.exposure_seconds": WINDOW, "data.max_history": 6, "model.width": 16, "model.text.mode": "off"}
    config = load_config().with_values(values | {f"data.{key}": value for key, value in data.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        dataset = prepare(config, Storage.from_config(config.storage))
    return dataset.complete(config), dataset


def plain_labels(log: pd.DataFrame) -> dict[tuple[str, str, int], tuple[int, int, int]]:
    """Return (click, purchase, position) of each impression: every event looks for its impression, row by row."""
    shown = log[log.event == "impression"]
    labels = {(row.user_id, row.item_id, row.timestamp): [0, 0, int(row.display_position)] for row in shown.itertuples()}
    for row in log[log.event != "impression"].itertuples():
        own = shown[(shown.user_id == row.user_id) & (shown.item_id == row.item_id)]
        named = own[own.impression_id == row.impression_id]
        before = own[(own.timestamp <= row.timestamp)].sort_values("timestamp", kind="stable")
        found = named if len(named) and isinstance(row.impression_id, str) else before.iloc[-1:]
        for impression in found.itertuples():
            is_named = isinstance(row.impression_id, str) and impression.impression_id == row.impression_id
            differs = isinstance(row.impression_id, str) and isinstance(impression.impression_id, str) and not is_named
            if is_named or (not differs and row.timestamp - impression.timestamp <= WINDOW):
                values = labels[(impression.user_id, impression.item_id, impression.timestamp)]
                values[0] = 1
                values[1] |= int(row.event == "purchase")
    return {key: (values[0], values[1], values[2]) for key, values in labels.items()}


Shown = tuple[str, str, int, int, int, tuple[tuple[str, str, int], ...]]
"""User, item, labels, known, position, and the history before."""


def found_exposures(dataset: Dataset) -> dict[str, list[Shown]]:
    """Return the exposures by part, from the training samples and the users' rows."""
    items = ["", *dataset.catalogue["item_id"].to_pylist()]
    users = dataset.read_users()
    ids = dict(zip(users["user_index"].to_pylist(), users["user_id"].to_pylist(), strict=True))

    def read(user: int, rows: Sequences, begin: int, end: int) -> list[Shown]:
        shown, kinds = rows.exposures, dataset.manifest.event_kinds
        assert shown is not None
        interactions = list(
            zip((items[item] for item in rows.items), (kinds[kind] for kind in rows.events), rows.timestamps.tolist(), strict=True)
        )
        columns = (shown.flat(name)[begin:end].tolist() for name in ("items", "labels", "known", "displays", "places"))
        return [
            (ids[user], items[item], label, known, display, tuple(interactions[:place]))
            for item, label, known, display, place in zip(*columns, strict=True)
        ]

    parts: dict[str, list[Shown]] = {"train": [], "validation": [], "test": []}
    for shard in dataset.manifest.train_shards:
        samples = Sequences.from_table(dataset.read_shard(shard))
        for row, user in enumerate(samples.scalars["user_index"].tolist()):
            sample = samples[row : row + 1]
            parts["train"] += read(user, sample, 0, int(sample.exposures.lengths[0]))  # type: ignore[union-attr]
    everyone = Sequences.from_table(users)
    for row, number in enumerate(users["num_validation_exposures"].to_pylist()):
        own, user = everyone[row : row + 1], users["user_index"][row].as_py()
        parts["validation"] += read(user, own, 0, number)
        parts["test"] += read(user, own, number, int(own.exposures.lengths[0]))  # type: ignore[union-attr]
    return parts


def _counts_by_item(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Return how often each item was shown and taken, from the statistics of items that were shown."""
    rows = read_rows(dataset, dataset.manifest.item_statistics_shards, "item_index")
    ids = dataset.catalogue["item_id"].to_pylist()
    shown = zip(ids, rows["num_shown"].to_pylist(), rows["num_taken"].to_pylist(), strict=True)
    return {item: (number, taken) for item, number, taken in shown if number}


@pytest.mark.parametrize("split", SPLITS)
def test_every_impression_is_there_once_with_its_labels_and_what_was_before_it(tmp_path: Path, split: str) -> None:
    log = shown_log()
    _, dataset = prepared(tmp_path, log, **SPLITS[split])
    manifest = dataset.manifest
    assert manifest.event_kinds == ("impression", "click", "purchase")
    assert [task.name for task in manifest.tasks] == list(manifest.exposure_tasks) == ["click", "purchase"]
    parts = found_exposures(dataset)
    expected = sorted((user, item, click + 2 * buy, 3, position) for (user, item, _), (click, buy, position) in plain_labels(log).items())
    assert sorted(shown[:5] for own in parts.values() for shown in own) == expected
    assert manifest.num_exposures == len(parts["train"])
    shown = Counter(own[1] for own in parts["train"])
    taken = Counter(own[1] for own in parts["train"] if own[2] & 1)
    assert _counts_by_item(dataset) == {item: (number, taken[item]) for item, number in shown.items()}
    assert all(parts.values())
    assert manifest.num_interactions == sum(log.event != "impression")
    by_user = {user: own.sort_values("timestamp", kind="stable") for user, own in log[log.event != "impression"].groupby("user_id")}
    for name, own in parts.items():
        for user, item, _, _, position, history in own:
            known = [(row.item_id, row.event, row.timestamp) for row in by_user[user].itertuples()] if user in by_user else []
            if split != "time":
                continue
            # Under a split by time a row is in order: an exposure sees all that is older, in training the window's last interactions.
            candidates = [
                [each for each in known if each[2] < row.timestamp]
                for row in log[(log.user_id == user) & (log.item_id == item) & (log.display_position == position)].itertuples()
            ]
            assert any(list(history) == (before[len(before) - len(history) :] if name == "train" else before) for before in candidates)


@pytest.mark.parametrize("split", SPLITS)
def test_no_label_in_training_comes_from_a_held_out_event(tmp_path: Path, split: str) -> None:
    generator = np.random.default_rng(1)
    rows: list[tuple[Any, ...]] = []
    for number, item in enumerate(
        generator.permutation(NUM_ITEMS * NUM_USERS)
    ):  # each user sees an item once, so a click has one impression
        user, shown = item % NUM_USERS, item // NUM_USERS
        time, part = START + int(generator.integers(10 * DAY)), ("train", "valid", "test")[number % 3]
        rows.append((f"u{user}", f"i{shown}", time, "impression", part))
        if generator.random() < 0.5:
            rows.append((f"u{user}", f"i{shown}", time + int(generator.integers(WINDOW)), "click", part))
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event", "part"])
    _, dataset = prepared(tmp_path, log, **SPLITS[split])
    items = ["", *dataset.catalogue["item_id"].to_pylist()]
    trained = {(row["user_id"], items[item]) for row in dataset.read_users().to_pylist() for item in row["items"][: row["num_train"]]}
    shown_in_training = found_exposures(dataset)["train"]
    clicked = {(user, item) for user, item, label, *_ in shown_in_training if label}
    assert clicked
    assert clicked <= trained


def test_users_who_were_only_shown_things_and_labels_in_any_order(tmp_path: Path) -> None:
    rows = [("u1", f"i{step}", step, "impression") for step in range(5)] + [("u2", f"i{step}", step, "click") for step in range(5)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event"])
    _, dataset = prepared(tmp_path, log, num_shards=8)
    assert dataset.manifest.num_exposures == sum(shown for shown, _ in _counts_by_item(dataset).values()) == 5
    labels = {"buy": "bought", "click": "clicked"}
    log = pd.DataFrame(
        [(f"u{step % 4}", f"i{step % 7}", step, step % 2, 0) for step in range(40)],
        columns=["user_id", "item_id", "timestamp", "clicked", "bought"],
    )
    _, dataset = prepared(tmp_path, log, event_kinds=["click", "buy"], columns={"labels": labels, "event": ""})
    assert dataset.manifest.exposure_tasks == ("click", "buy")
    shown = [each for part in found_exposures(dataset).values() for each in part]
    assert sum(label & 1 for _, _, label, *_ in shown) == 20
    assert all(label < 2 for _, _, label, *_ in shown)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.kinds": {"impression": {"marks_seen": True}}}, r"data\.kinds\.impression\.marks_seen = true"),
        ({"data.kinds": {"view": {"in_history": False}}}, r"data\.kinds\.view\.in_history = false"),
        ({"data.kinds": {"view": {"role": "ignored", "in_history": True}}}, "events with the role ignored are dropped"),
        ({"data.collapse_seconds": 5, "data.columns.labels": {"click": "label"}}, r"rows of data\.columns\.labels are not collapsed"),
    ],
)
def test_roles_that_contradict_themselves_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config().with_values(settings)
    assert load_config(None, ["data.kinds.dislike.in_history=false", "data.kinds.dislike.marks_seen=false"]).data.kinds


def test_a_day_appended_has_the_exposures_of_one_preparation(tmp_path: Path) -> None:
    log = shown_log()
    end = START + 7 * DAY
    log = log[(log.timestamp - end).abs() > 3 * WINDOW]  # no click on one side belongs to an impression on the other
    split = {"split": "time", "validation_from": START + 6 * DAY, "test_from": START + 8 * DAY}
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    _, whole = prepared(folders[0], log, **split)
    _, base = prepared(folders[1], log[log.timestamp < end], **split)
    _, day = prepared(folders[1], log[log.timestamp >= end], base=base.uri)
    assert day.manifest.version == 2
    assert day.manifest.num_exposures == whole.manifest.num_exposures
    of_whole, of_parts = found_exposures(whole), found_exposures(day)
    for part in of_whole:
        assert sorted(shown[:5] for shown in of_parts[part]) == sorted(shown[:5] for shown in of_whole[part])
    for part in ("validation", "test"):
        assert sorted(of_parts[part]) == sorted(of_whole[part])
    assert _counts_by_item(day) == _counts_by_item(whole)


def test_sequential_baselines_know_the_place_before_a_history(tmp_path: Path) -> None:
    config, dataset = prepared(tmp_path, shown_log())
    short = config.with_values({"evaluation.baseline_epochs": 2, "evaluation.baselines": ["sasrec", "din", "dcn", "factorization_machine"]})
    predictor = build_predictor(short, dataset, build_recommender(short, dataset, torch.device("cpu")).eval())
    found = evaluate(predictor, dataset, short.evaluation)["baselines"]
    assert 0 <= found["sasrec"]["ndcg@10"] <= 1
    for name in ("din", "dcn", "factorization_machine"):
        assert found[name]["click.num_labels"] == len(ExposedTargets.read(dataset, "test").labels)


def test_a_training_sample_is_cut_again_without_losing_an_exposure(tmp_path: Path) -> None:
    _, dataset = prepared(tmp_path, shown_log(), max_history=50, max_exposures=5)
    samples = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]))
    assert samples.exposures is not None
    assert samples.exposures.lengths.max() == 5
    cut = cut_windows(samples, 3, np.full(len(samples), 2))
    assert cut.exposures is not None

    def contexts(rows: Sequences) -> list[tuple[int, int, tuple[int, ...]]]:
        assert rows.exposures is not None
        found = []
        for row in range(len(rows)):
            own = rows[row : row + 1]
            shown = rows.exposures[row : row + 1]
            for item, label, place in zip(shown.items, shown.flat("labels"), shown.flat("places"), strict=True):
                found.append((int(item), int(label), tuple(own.items[:place].tolist()[-2:])))
        return sorted(found)

    assert contexts(cut) == contexts(samples)
    assert cut.lengths.max() <= 4
    targets = [int(each) for rows in (samples, cut) for each in (rows.lengths - rows.scalars["first_target"]).sum(keepdims=True)]
    assert targets[0] == targets[1]


def test_unclicked_impressions_are_no_targets_and_may_be_recommended(tmp_path: Path) -> None:
    log = shown_log()
    config, dataset = prepared(tmp_path, log)
    clicked = set(
        log[log.event != "impression"].groupby("user_id").item_id.apply(set).explode().reset_index().itertuples(index=False, name=None)
    )
    users = dataset.read_users(["user_id", "items"])
    items = ["", *dataset.catalogue["item_id"].to_pylist()]
    found = {
        (user, items[item]) for user, own in zip(*(users[name].to_pylist() for name in ("user_id", "items")), strict=True) for item in own
    }
    assert found == clicked
    batch = Collator(dataset.manifest, True)(whole_shard(dataset), *NOTHING)
    assert len(batch.targets) + len(batch.exposures) == len(batch.labels)
    assert (batch.label_mask[: len(batch.targets)] == 0).all()
    assert batch.labels[len(batch.targets) :].mean(0).tolist() == pytest.approx(shares(dataset))
    result = evaluate(
        predictor := build_predictor(config, dataset, build_recommender(config, dataset, torch.device("cpu")).eval()),
        dataset,
        config.evaluation,
    )
    assert result["metrics"]["click.num_labels"] == len(ExposedTargets.read(dataset, "test").labels)
    history = Sequences.of([1, 2])
    (ranking,) = predictor.recommend([history], NUM_ITEMS, [history.items])
    assert len(ranking.items) == len(items) - 3


def whole_shard(dataset: Dataset) -> Sequences:
    table = dataset.read_shard(dataset.manifest.train_shards[0])
    return Sequences.from_table(table, sample_id=np.arange(table.num_rows))


def shares(dataset: Dataset) -> list[float]:
    labels = whole_shard(dataset).exposures.flat("labels")  # type: ignore[union-attr]
    return [float((labels & 1).mean()), float((labels >> 1).mean())]


@pytest.mark.parametrize(("attention", "kind"), [("softmax", "additive"), ("hstu", "additive"), ("softmax", "regression")])
def test_what_training_computes_for_an_exposure_is_what_is_served(tmp_path: Path, attention: str, kind: str) -> None:
    config, dataset = prepared(tmp_path, shown_log(), max_history=50, kinds={"impression": {"in_history": kind == "regression"}})
    config = config.with_values({"model.attention": attention, "model.ranker.kind": kind})
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.ranker.display_bias.data.zero_()  # type: ignore[union-attr]
    predictor, rows = build_predictor(config, dataset, model), whole_shard(dataset)
    batch = Collator(dataset.manifest, True, max_history=50)(rows, *NOTHING)
    with torch.no_grad():
        losses = model(batch)
    expected = torch.zeros(2)
    for row in range(len(rows)):
        own, shown = rows[row : row + 1], rows.exposures[row : row + 1]  # type: ignore[index]
        for item, label, place in zip(shown.items, shown.flat("labels"), shown.flat("places"), strict=True):
            history = Sequences.of(own.items[:place], own.events[:place], own.timestamps[:place], own.values[:place])
            (scores,) = predictor.score([history], [np.array([item], np.int64)])
            for task, name in enumerate(("click", "purchase")):
                truth = torch.tensor(float(label >> task & 1))
                expected[task] += F.binary_cross_entropy(torch.tensor(float(scores[name][0])), truth)
    assert [losses["click"].item(), losses["purchase"].item()] == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_bias_by_position_is_learned_and_not_served(tmp_path: Path) -> None:
    config, dataset = prepared(tmp_path, shown_log())
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    ranker = model.ranker
    assert ranker.display_bias is not None
    with torch.no_grad():
        ranker.display_bias[:] = torch.arange(len(ranker.display_bias))[:, None]
        shown = whole_shard(dataset).exposures
        assert shown is not None
        displays = torch.from_numpy(shown.flat("displays")).long()
        added = ranker.add_display_bias(torch.zeros(len(displays), 2), displays)
        mean = ranker.display_shares @ ranker.display_bias
    torch.testing.assert_close(added, displays[:, None] - mean)
    assert ranker.display_shares.sum().item() == pytest.approx(1)


def test_dislikes_are_negative_labels_and_no_targets(tmp_path: Path) -> None:
    rows = [
        (f"u{user}", f"i{(user * 3 + step) % 12}", step, "dislike" if step % 3 == 2 else "like") for user in range(30) for step in range(9)
    ]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event"])
    _, dataset = prepared(tmp_path, log)
    manifest = dataset.manifest
    assert manifest.event_kinds == ("dislike", "like")
    assert not manifest.only_exposures_have_labels
    batch = Collator(manifest, True)(whole_shard(dataset), *NOTHING)
    num_targets = len(batch.targets)
    assert (batch.labels[:num_targets] == 1).all()
    assert (batch.labels[num_targets:] == 0).all()
    assert len(batch.exposures) == whole_shard(dataset).exposures.lengths.sum() > 0  # type: ignore[union-attr]
    users = dataset.read_users()
    for row in users.to_pylist():
        assert row["events"][row["num_train"]] == 1  # the validation target is a like
    counts = log[log.event == "like"].groupby("item_id").size()
    assert sum(dataset.catalogue["train_count"].to_pylist()) == counts.sum() - 2 * 30


def test_ignored_kinds_and_wrong_labels_are_counted(tmp_path: Path) -> None:
    log = shown_log().assign(label=1)
    log.loc[:9, "label"] = 7
    log.loc[10:14, "part"] = "holdout"
    _, dataset = prepared(tmp_path, log, split="column", columns={"split": "part", "labels": {"click": "label"}, "event": ""})
    assert dataset.manifest.rejected["bad_label"] == 10
    assert dataset.manifest.rejected["bad_split"] == 5
    _, dataset = prepared(tmp_path, shown_log(), kinds={"purchase": {"role": "ignored"}})
    assert dataset.manifest.rejected["ignored_kind"] == sum(log.event == "purchase")
    assert dataset.manifest.event_kinds == ("impression", "click")
    with pytest.raises(UserError, match=r"data\.split = 'column' needs data\.columns\.split"):
        load_config(None, ["data.split=column"])


def test_versions_are_compared_on_exposures(tmp_path: Path) -> None:
    config, dataset = prepared(tmp_path, shown_log())
    one, other = (
        build_predictor(seeded, dataset, build_recommender(seeded, dataset, torch.device("cpu")).eval())
        for seeded in (config, config.with_values({"training.seed": 1}))
    )
    asked = config.evaluation.model_copy(update={"metric": "click.auc", "guards": {"ndcg@10": -1.0}})
    same = compare_versions(one, one, dataset, asked, tmp_path)
    assert [change.difference for change in same.values()] == [0, 0]
    found = compare_versions(one, other, dataset, asked, tmp_path)["click.auc"]
    exposed = ExposedTargets.read(dataset, "validation")
    scored = np.concatenate([one.score([user.history], [user.targets.items])[0]["click"] for user in exposed.users])
    assert found.new == pytest.approx(roc_auc_score(exposed.labels[:, 0], scored), abs=1e-6)
    assert found.interval is not None
    assert found.interval[0] < found.difference < found.interval[1]
