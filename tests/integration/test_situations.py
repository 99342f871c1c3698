"""Profiles of users and contexts of events, from raw tables to lists: against plain references, planted effects, offline and served."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import torch
import torch.nn.functional as F

from recsys.config import Config, load_config
from recsys.data.batch import Collator
from recsys.data.draws import AloneDraws
from recsys.data.manifest import Dataset
from recsys.data.sequences import ASKED, Sequences
from recsys.errors import UserError
from recsys.evaluation.evaluator import evaluate
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import lists_by, rank_users
from recsys.evaluation.significance import interval_95, resampled_means
from recsys.evaluation.users import TargetRules, find_new_users, read_evaluation_users
from recsys.exports.files import load_export, write_export
from recsys.ingest.prepare import prepare
from recsys.model.recommender import build_recommender
from recsys.objectives.next_item import NextItem
from recsys.predictor import Predictor
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from serve.answers.answering import Answerer
from serve.api.protocol import ModelInfo, RecommendRequest, ScoreRequest
from tests.checkpoints import store_of
from tests.datasets import open_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_GROUPS, GROUP, START, DAY = 400, 4, 40, 1_700_006_400, 86_400
DEVICES = ("phone", "tv")

Small = tuple[Config, Dataset, pd.DataFrame, pd.DataFrame]


def world(num_events: int = 24) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return events and users: the taste decides the group of items, the weekend which half of it; the device means nothing."""
    generator = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    tastes, ages = generator.integers(NUM_GROUPS, size=NUM_USERS), generator.integers(18, 80, size=NUM_USERS)
    for user in range(NUM_USERS):
        days = np.sort(generator.choice(120, num_events, replace=False))
        for day in days.tolist():
            time = START + day * DAY + int(generator.integers(DAY // 2))
            is_weekend = (time // DAY + 3) % 7 >= 5
            device, half = int(generator.integers(2)), GROUP // 2
            item = tastes[user] * GROUP + is_weekend * half + int(generator.integers(half))
            item = int(generator.integers(NUM_GROUPS * GROUP)) if generator.random() < 0.1 else item
            rows.append((f"u{user}", f"i{item}", time, DEVICES[device] if generator.random() < 0.9 else None))
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "device"])
    names = [f"taste{taste}" if number % 10 else None for number, taste in enumerate(tastes)]
    users = pd.DataFrame({"user_id": [f"u{user}" for user in range(NUM_USERS)], "taste": names, "age": ages, "secret": tastes})
    listed = pd.DataFrame({"user_id": ["only listed", "u0"], "taste": ["taste1", "taste2"], "age": [30, 31], "secret": [1, 2]})
    return events, pd.concat([users, listed], ignore_index=True)


def prepared(folder: Path, events: pd.DataFrame, users: pd.DataFrame, **values: Any) -> tuple[Config, Dataset]:
    folder.mkdir(exist_ok=True)
    events.to_csv(folder / "events.csv", index=False)
    users.to_csv(folder / "users.csv", index=False)
    settings = {
        "storage.root": str(folder.parent / "store"),
        "run.scratch": str(folder.parent / "scratch"),
        "data.folder": str(folder),
        "data.columns.context": ["device"],
        "data.derived_context": ["hour", "weekday", "gap", "activity"],
        "data.sensitive": ["secret"],
        "data.max_history": 20,
        "model.width": 32,
        "model.text.mode": "off",
        "model.use_profiles": True,
    }
    config = load_config().with_values(settings | {key.replace("__", "."): value for key, value in values.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        dataset = prepare(config, Storage.from_config(config.storage))
    return dataset.complete(config), dataset


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset, pd.DataFrame, pd.DataFrame]:
    events, users = world(12)
    return *prepared(tmp_path_factory.mktemp("small") / "input", events, users), events, users


def random_predictor(config: Config, dataset: Dataset) -> tuple[Predictor, torch.nn.Module]:
    model = build_recommender(config, dataset, torch.device("cpu")).eval()
    torch.nn.init.normal_(model.user_encoder.context.down.weight, std=0.3)
    return build_predictor(config, dataset, model), model


def test_contexts_and_profiles_of_the_rows_are_those_of_the_tables(small: Small) -> None:
    _, dataset, events, users = small
    table, space = dataset.read_users(), dataset.manifest.contexts
    rows = Sequences.from_table(table)
    assert rows.profiles is not None
    plain = {user: own.sort_values("timestamp", kind="stable") for user, own in events.groupby("user_id")}
    attributes = {row["user_id"]: row for row in reversed(users.to_dict("records"))}  # the first row of an id counts
    for row, user in enumerate(table["user_id"].to_pylist()):
        own, times = plain[user], pd.to_datetime(plain[user].timestamp, unit="s", utc=True)
        hours, weekdays, gaps, activities, devices = space.split(rows[row : row + 1].flat("contexts"))
        assert [code - 1 for code in hours.tolist()] == times.dt.hour.tolist()
        assert [code - 1 for code in weekdays.tolist()] == times.dt.day_of_week.tolist()
        seconds = np.diff(own.timestamp.to_numpy())
        assert gaps.tolist() == [0, *(np.floor(np.log2(1 + seconds)) + 1).astype(int).tolist()]
        assert activities.tolist() == (np.floor(np.log2(1 + np.arange(len(own)))) + 1).astype(int).tolist()
        assert [(None, *DEVICES)[code] for code in devices.tolist()] == own.device.astype(object).where(own.device.notna(), None).tolist()
        taste = attributes[user]["taste"]
        index = rows.profiles[row : row + 1].flat("categories")
        names = {dataset.manifest.profiles.vocabulary[number - 1] for number in index.tolist()}
        assert f"taste={taste if isinstance(taste, str) else ''}" in names
    assert set(dataset.manifest.profiles.columns) == {"taste", "age"}
    assert "secret" in dict(table["attributes"][0].as_py())  # for slices and fairness alone


def test_training_samples_carry_them(small: Small) -> None:
    _, dataset, *_ = small
    users = Sequences.from_table(dataset.read_users())
    assert users.profiles is not None
    for shard in dataset.manifest.train_shards:
        samples = Sequences.from_table(dataset.read_shard(shard))
        assert samples.profiles is not None
        for row, user in enumerate(samples.scalars["user_index"].tolist()):
            own = users[user : user + 1].within(0, users.scalars["num_train"][user : user + 1])
            assert samples[row : row + 1].flat("contexts").tolist() == own.last(int(samples.lengths[row])).flat("contexts").tolist()
            profile, expected = samples.profiles[row : row + 1], users.profiles[user : user + 1]
            assert profile.flat("categories").tolist() == expected.flat("categories").tolist()


def test_states_of_training_are_those_of_inference(small: Small) -> None:
    config, dataset, *_ = small
    predictor, model = random_predictor(config, dataset)
    table = dataset.read_shard(dataset.manifest.train_shards[0])
    samples = Sequences.from_table(table, sample_id=np.arange(table.num_rows))[:20]
    collate = Collator(dataset.manifest, True, alone=AloneDraws(1.0, 0))
    batch = collate(samples, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    with torch.no_grad():
        states = model.user_encoder(F.embedding(batch.histories.items, model.item_encoder(None)), batch.histories)
        users = model.user_encoder.ask(F.embedding(batch.target_places, states), batch.contexts)
    owners = np.repeat(np.arange(20), samples.lengths - 1)
    places = np.concatenate([np.arange(1, length) for length in samples.lengths])
    histories = [samples[[row]].within(0, np.array([place])) for row, place in zip(owners, places, strict=True)]
    asked = [samples[[row]].flat("contexts")[place : place + 1] for row, place in zip(owners, places, strict=True)]
    assert len(batch.targets) == len(owners) + 20
    for row, code, target in zip(range(20), batch.contexts[len(owners) :].numpy(), batch.targets[len(owners) :].tolist(), strict=True):
        own = samples[[row]]
        as_new = dataset.manifest.contexts.without_history(own.flat("contexts"))
        place = next(place for place in range(1, len(as_new)) if (own.items[place], as_new[place]) == (target, code))
        histories.append(own.within(0, np.array([0])))
        asked.append(own.flat("contexts")[place : place + 1])  # what the history says does not matter without one
    encoded = predictor.encode([replace(history, scalars={ASKED: code}) for history, code in zip(histories, asked, strict=True)])
    torch.testing.assert_close(encoded, users, rtol=1e-5, atol=1e-5)


def test_a_rank_without_samples_gives_every_parameter_a_gradient(small: Small) -> None:
    config, dataset, *_ = small
    _, model = random_predictor(config, dataset)
    collate = Collator(dataset.manifest, True, alone=AloneDraws(1.0, 0))
    nothing = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]), sample_id=np.zeros(1, np.int64))[:0]
    sum(model(collate(nothing, torch.zeros(0, dtype=torch.long), torch.zeros(0))).values()).backward()
    assert [name for name, parameter in model.user_encoder.named_parameters() if parameter.grad is None] == []


def test_served_is_evaluated(small: Small, tmp_path: Path) -> None:
    config, dataset, *_ = small
    config = config.with_values({"ranking.num_candidates": 20, "ranking.blend": {"retrieval": 1.0}})
    predictor, model = random_predictor(config, dataset)
    write_export(predictor, model.state_dict(), dataset, tmp_path, 4)
    loaded = load_export(tmp_path)
    users = read_evaluation_users(dataset, "test")[:100]
    scores = lists_by(predictor)(users)
    table = dataset.read_users()
    info = ModelInfo(
        version="v1",
        alias="production",
        dataset_fingerprint="",
        num_items=dataset.manifest.num_items,
        tasks=[],
        event_kinds=["interaction"],
        takes_queries=False,
        profile_columns=["taste", "age"],
        context_fields=["device"],
        metrics={},
        code_version=None,
    )
    answerer = Answerer(loaded.predictor, loaded.profiles, info)
    ids, fields = predictor.catalogue.item_ids, dataset.manifest.contexts
    requests = []
    for user in users:
        attributes = dict(table["attributes"][user.user_index].as_py())
        profile = {"taste": attributes.get("taste", ""), "age": int(attributes["age"])}
        device = fields.split(user.targets.flat("contexts"))[-1][0]
        history = [
            {"item_id": ids[item], "timestamp": time}
            for item, time in zip(user.history.items.tolist(), user.history.timestamps.tolist(), strict=True)
        ]
        context = {"device": DEVICES[device - 1]} if device else {}
        moment = int(user.targets.timestamps[0])
        requests.append(RecommendRequest(history=history, profile=profile, context=context, time=moment, limit=10))
    for user, row, answer in zip(users, scores, answerer.recommend(requests), strict=True):
        assert answer.status == 200, answer.body
        found = {item["item_id"]: item["score"] for item in json.loads(answer.body)["items"]}
        np.testing.assert_allclose(list(found.values()), [row[predictor.item_index[item_id]] for item_id in found], atol=1e-6, rtol=0)
        assert len(found) == 10
        assert not set(found).intersection(ids[item] for item in user.history.items.tolist())
    known, unknown = answerer.recommend([RecommendRequest(user_id="u3", time=START, limit=3), RecommendRequest(user_id="nobody", limit=3)])
    assert b'"fallback":null' in known.body
    assert b'"fallback":"popularity"' in unknown.body
    listed, posted = answerer.recommend(
        [RecommendRequest(user_id="only listed", time=START), RecommendRequest(profile={"taste": "taste1", "age": 30}, time=START)]
    )
    assert json.loads(listed.body)["items"] == json.loads(posted.body)["items"]
    assert loaded.profiles.find("only listed") is not None
    assert len(loaded.profiles) == NUM_USERS + 1
    by_profile, other = answerer.recommend([RecommendRequest(profile={"taste": f"taste{number}"}, time=START) for number in (1, 3)])
    assert b'"fallback":null' in by_profile.body
    assert by_profile.body != other.body
    place = next(row for row in range(table.num_rows) if dict(table["attributes"][row].as_py()).get("taste") == "taste1")
    own, moment = Sequences.from_table(table)[[place]], int(users[0].targets.timestamps[0])
    new = replace(own.within(0, np.zeros(1, np.int64)), scalars={ASKED: dataset.manifest.contexts.ask(moment, moment - 90, 7, {})})
    (answer,) = answerer.recommend([RecommendRequest(profile=dict(table["attributes"][place].as_py()) | {"secret": ""}, time=moment)])
    assert answer.status == 409
    profile = {name: value for name, value in table["attributes"][place].as_py() if name != "secret"}
    (answer,) = answerer.recommend([RecommendRequest(profile=profile, time=moment)])
    (ranking,) = predictor.recommend([new], 10, [np.zeros(0, np.int64)])
    found = {item["item_id"]: item["score"] for item in json.loads(answer.body)["items"]}
    np.testing.assert_allclose([found[ids[item]] for item in ranking.items.tolist()], ranking.scores, atol=1e-6, rtol=0)
    (refused,) = answerer.score([ScoreRequest(profile={"secret": "1"}, candidates=["i1"])])
    assert refused.status == 409
    assert b"profile.secret: this version does not read it; it reads: taste, age" in refused.body


def test_an_appended_version_keeps_the_meaning_of_codes(small: Small, tmp_path: Path) -> None:
    config, base, events, _ = small
    late = events.timestamp.max()
    new = pd.DataFrame(
        [("u1", "i1", 60, "watch"), ("new", "i2", 90, "tv"), ("new", "i3", 3690, None), ("new", "i4", 3700, "tv")], columns=events.columns
    )
    new["timestamp"] += late
    profiles = pd.DataFrame({"user_id": ["new"], "taste": ["taste9"], "age": [44], "secret": [1]})
    root = {"storage__root": config.storage.root, "run__scratch": config.run.scratch, "data__base": base.uri}
    _, dataset = prepared(tmp_path / "day", new, profiles, **root)
    before, after = base.manifest, dataset.manifest
    new_values = [name for name in ("taste=taste9", "age=44") if name not in before.profiles.vocabulary]
    assert sorted(after.profiles.vocabulary[len(before.profiles.vocabulary) :]) == sorted(new_values)
    assert "taste=taste9" in new_values
    assert after.profiles.vocabulary[: len(before.profiles.vocabulary)] == before.profiles.vocabulary
    assert after.profiles.moments == before.profiles.moments
    table = dataset.read_users()
    rows, names = Sequences.from_table(table), table["user_id"].to_pylist()
    old = Sequences.from_table(base.read_users())
    one = base.read_users()["user_id"].to_pylist().index("u1")
    codes = rows[[names.index("u1")]].flat("contexts")
    assert codes[:-1].tolist() == old[[one]].flat("contexts").tolist()
    devices = {field.name: field.values for field in after.contexts.fields}["device"]
    assert devices == (*DEVICES, "watch")
    parts = [part.tolist() for part in after.contexts.split(rows[[names.index("new")]].flat("contexts"))]
    assert parts[2] == [0, 12, 4]
    assert [devices[code - 1] if code else None for code in parts[-1]] == ["tv", None, "tv"]


def test_withheld_users_are_never_trained_on_and_have_no_history(tmp_path: Path) -> None:
    events, users = world(8)
    _, dataset = prepared(tmp_path / "input", events, users, data__withheld_users=0.25)
    table = dataset.read_users()
    is_withheld = table["num_train"].to_numpy() == 0
    assert 0.15 < is_withheld.mean() < 0.35
    trained = {user for shard in dataset.manifest.train_shards for user in dataset.read_shard(shard)["user_index"].to_pylist()}
    indices = table["user_index"].to_numpy()
    assert trained == set(indices[~is_withheld].tolist())
    for split in ("validation", "test"):
        found = find_new_users(dataset, split, TargetRules.of(dataset.manifest, load_config().evaluation))
        assert [user.user_index for user in found] == indices[is_withheld].tolist()
        assert all(not len(user.history.items) and len(user.targets.items) == 1 for user in found)
        warm = {user.user_index for user in read_evaluation_users(dataset, split)}
        assert warm
        assert not warm.intersection(indices[is_withheld].tolist())
    assert int(dataset.catalogue["train_count"].to_numpy().sum()) == int(pc.sum(table["num_train"]).as_py())


def test_positions_have_no_time_and_sensitive_columns_are_no_inputs(tmp_path: Path) -> None:
    events, users = world(4)
    with pytest.raises(UserError, match=r"data.derived_context = hour: the events have positions and no times"):
        prepared(tmp_path / "input", events.rename(columns={"timestamp": "position"}), users)
    with pytest.raises(UserError, match=r"data.user_features.categories = secret: data.sensitive names it"):
        prepared(tmp_path / "other", events, users, data__user_features__categories=["secret"])
    with pytest.raises(UserError, match=r"data.sensitive = Secret: no table has this column; columns: age, device, item_id"):
        prepared(tmp_path / "misspelled", events, users, data__sensitive=["Secret"])
    with pytest.raises(UserError, match=r"data.columns.context = hour: is named twice, or as a field of data.derived_context"):
        prepared(tmp_path / "hour", events, users, data__columns__context=["hour"])


def test_a_listed_user_keeps_the_profile_with_the_first_event(small: Small, tmp_path: Path) -> None:
    config, base, events, _ = small
    new = pd.DataFrame([("only listed", f"i{item}", events.timestamp.max() + item, "tv") for item in (1, 2, 3)], columns=events.columns)
    (tmp_path / "day").mkdir()
    new.to_csv(tmp_path / "day" / "events.csv", index=False)
    root = {"storage.root": config.storage.root, "run.scratch": config.run.scratch, "data.base": base.uri}
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        dataset = prepare(load_config().with_values(root | {"data.folder": str(tmp_path / "day")}), Storage.from_config(config.storage))
    table = dataset.read_users()
    row = table["user_id"].to_pylist().index("only listed")
    assert dict(table["attributes"][row].as_py())["taste"] == "taste1"
    profiles = Sequences.from_table(table).profiles
    assert profiles is not None
    names = [dataset.manifest.profiles.vocabulary[index - 1] for index in profiles[[row]].flat("categories").tolist()]
    assert "taste=taste1" in names


def train(config: Config) -> int | None:
    return Trainer(config, open_dataset(config), LocalReporter(), NextItem).run().best_step


def trained(config: Config, name: str, **values: Any) -> tuple[Predictor, Dataset]:
    settings = {
        "run.name": name,
        "training.num_workers": 1,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 16,
        "training.epochs": 40,
        "training.early_stopping_patience": 10,
        "optimizer.learning_rate": 3e-3,
    }
    given = config.with_values(settings | {key.replace("__", "."): value for key, value in values.items()})
    best = run_distributed(train, 1, given)[0]
    _, config, dataset, recommender = load_trained(Storage.from_config(given.storage), store_of(given).uri(best), given.run.scratch)
    return build_predictor(config, dataset, recommender), dataset


@pytest.mark.slow
def test_planted_effects_of_weekday_and_profile_are_found(tmp_path: Path) -> None:
    events, users = world()
    config, dataset = prepared(tmp_path / "input", events, users, data__withheld_users=0.2)
    with_all, _ = trained(config, "all")
    without, _ = trained(config, "without", model__use_contexts=False)
    warm = read_evaluation_users(dataset, "test")
    values = [
        ranking_metrics(rank_users(lists_by(predictor), warm, predictor.config.evaluation).ranks, (10,))["ndcg@10"]
        for predictor in (with_all, without)
    ]
    low, high = interval_95(resampled_means((values[0] - values[1])[:, None], np.random.default_rng(0)))
    print(f"NDCG@10: {values[0].mean():.3f} with contexts, {values[1].mean():.3f} without: [{low:+.3f}, {high:+.3f}]")
    assert low > 0
    found = evaluate(with_all, dataset, with_all.config.evaluation)["new_users"]["metrics"]["ndcg@10"]
    print(f"users without history: {found['value']:.3f} by profile, {found['other']:.3f} by popularity")
    assert found["value"] > 1.3 * found["other"]
    assert found["interval_95"][0] > 0
