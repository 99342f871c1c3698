"""Answers: mixed batches, timestamps and ties, unknown items, and the model's description."""

import json
from pathlib import Path
from typing import Any

import pytest

from recsys.data.sequences import Sequences
from recsys.exports.files import Export
from recsys.exports.registry import Registry
from recsys.store import Storage
from serve.answers.answering import Answerer
from serve.api.problems import Answer
from serve.api.protocol import RecommendRequest, ScoreRequest
from tests.exports import METRICS, publish_export, service_config


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Answerer]:
    config = service_config(tmp_path_factory.mktemp("answers"))
    export = publish_export(config, "v1")
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    return export, Answerer.load(registry, "v1", "production", Path(config.run.scratch))


def body_of(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer
    return json.loads(answer.body)


def test_a_mixed_batch_is_answered_each_by_its_own(published: tuple[Export, Answerer]) -> None:
    export, answerer = published
    requests = [
        RecommendRequest(user_id="user-3", limit=3),
        RecommendRequest(user_id="nobody", limit=2),
        RecommendRequest(history=[{"item_id": "item-1", "event": "stare"}]),
        RecommendRequest(user_id="user-4", limit=100, exclude_seen=False),
        RecommendRequest(history=[]),
        RecommendRequest(history=[{"item_id": "gone"}, {"item_id": "item-5"}, {"item_id": "gone"}], limit=1),
    ]
    answers = answerer.recommend(requests)
    first, unknown, wrong, whole, empty, partly = answers
    expected = export.predictor.recommend([export.profiles.find("user-3")], 3, [export.profiles.find("user-3").items])[0]
    assert [item["item_id"] for item in body_of(first)["items"]] == [f"item-{index}" for index in expected.items]
    assert [item["rank"] for item in body_of(first)["items"]] == [1, 2, 3]
    assert body_of(first)["items"][0]["title"].startswith("Story")
    assert body_of(first)["fallback"] is None
    popular = export.predictor.popular(2, Sequences.of([]).items)
    assert [item["score"] for item in body_of(unknown)["items"]] == popular.scores.tolist()
    assert body_of(unknown)["fallback"] == body_of(empty)["fallback"] == "popularity"
    assert wrong.status == 409
    assert json.loads(wrong.body)["detail"] == "history.0.event: is not an event kind of this model; known: view, purchase"
    assert len(body_of(whole)["items"]) == 60
    assert body_of(partly)["unknown_items"] == ["gone"]
    assert body_of(partly)["fallback"] is None
    assert {body_of(answer)["version"] for answer in answers if answer is not wrong} == {"v1"}


def test_seen_items_are_left_out_only_if_asked(published: tuple[Export, Answerer]) -> None:
    export, answerer = published
    seen = {f"item-{index}" for index in export.profiles.find("user-3").items}
    without, whole = (
        {item["item_id"] for item in body_of(answer)["items"]}
        for answer in answerer.recommend([RecommendRequest(user_id="user-3", limit=60, exclude_seen=exclude) for exclude in (True, False)])
    )
    assert seen
    assert whole - without == seen


def test_times_sort_a_posted_history_and_ties_keep_their_order(published: tuple[Export, Answerer]) -> None:
    _, answerer = published
    sorted_history = [{"item_id": f"item-{index}", "timestamp": time} for index, time in ((1, 10), (2, 20), (3, 20), (4, 30))]
    shuffled = [sorted_history[position] for position in (1, 3, 2, 0)]
    swapped = [sorted_history[position] for position in (2, 3, 1, 0)]
    expected, same, other = (
        body_of(answer)["items"]
        for answer in answerer.recommend([RecommendRequest(history=rows) for rows in (sorted_history, shuffled, swapped)])
    )
    assert [item["score"] for item in same] == pytest.approx([item["score"] for item in expected], abs=1e-6)
    assert [item["score"] for item in other] != pytest.approx([item["score"] for item in expected], abs=1e-6)


def test_scores_keep_the_candidates_order_and_say_what_is_unknown(published: tuple[Export, Answerer]) -> None:
    export, answerer = published
    candidates = ["item-9", "gone", "item-2", "item-9"]
    known, unknown_user, nothing = (
        body_of(answer)
        for answer in answerer.score(
            [
                ScoreRequest(user_id="user-3", candidates=candidates),
                ScoreRequest(user_id="nobody", candidates=candidates),
                ScoreRequest(history=[{"item_id": "lost"}, {"item_id": "item-1"}], candidates=["gone"]),
            ]
        )
    )
    expected = export.predictor.score([export.profiles.find("user-3")], [_indices(9, 2, 9)])[0]
    assert [row["item_id"] for row in known["scores"]] == candidates
    assert [row["known"] for row in known["scores"]] == [True, False, True, True]
    assert known["unknown_items"] == ["gone"]
    for name in ("retrieval", "purchase", "rating", "like"):
        values = [row[name] for row in known["scores"]]
        assert values[1] is None
        assert [values[0], *values[2:]] == pytest.approx(expected[name].tolist(), abs=1e-6)
    assert unknown_user["fallback"] == "popularity"
    assert unknown_user["scores"][0] == {
        "item_id": "item-9",
        "known": True,
        "retrieval": export.predictor.popularity[9].item(),
        "purchase": None,
        "rating": None,
        "like": None,
    }
    assert nothing["fallback"] is None
    assert nothing["unknown_items"] == ["lost", "gone"]


def test_the_model_says_what_it_is(published: tuple[Export, Answerer]) -> None:
    export, answerer = published
    info = answerer.info
    assert (info.version, info.alias, info.num_items, info.metrics) == ("v1", "production", 60, METRICS)
    assert info.dataset_fingerprint == export.predictor.manifest.fingerprint
    assert info.tasks == ["purchase", "rating", "like"]
    assert info.event_kinds == ["view", "purchase"]
    assert not info.takes_queries


@pytest.fixture(scope="module")
def published_with_queries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Answerer]:
    config = service_config(tmp_path_factory.mktemp("queries"))
    values = {"model.query_rate": 0.5, "model.text.mode": "frozen", "model.text.backbone": "tiny", "model.text.max_tokens": 16}
    export = publish_export(config, "v1", values=values)
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    return export, Answerer.load(registry, "v1", "production", Path(config.run.scratch))


def test_queries_are_answered_as_they_are_offline(published_with_queries: tuple[Export, Answerer]) -> None:
    export, answerer = published_with_queries
    assert answerer.info.takes_queries
    known, nobody = export.profiles.find("user-3"), Sequences.of([])
    plain, asking, stranger, anybody, unheard = (
        body_of(answer)
        for answer in answerer.recommend(
            [
                RecommendRequest(user_id="user-3", limit=60),
                RecommendRequest(user_id="user-3", query="a horror story", limit=60),
                RecommendRequest(user_id="nobody", query="drama 7", limit=60),
                RecommendRequest(query="drama 7", limit=60),
                RecommendRequest(history=[{"item_id": "gone"}], query="drama 7", limit=60),
            ]
        )
    )
    nothing = nobody.items
    offline = export.predictor.recommend(
        [known, known, nobody], 60, [known.items, known.items, nothing], [None, "a horror story", "drama 7"]
    )
    for answer, expected in zip((plain, asking, stranger), offline, strict=True):
        served = {item["item_id"]: item["score"] for item in answer["items"]}
        for index, score in zip(expected.items, expected.scores, strict=True):
            assert served[f"item-{index}"] == pytest.approx(score, abs=1e-5)
        assert len(served) == len(expected.items)
    assert [item["score"] for item in asking["items"]] != pytest.approx([item["score"] for item in plain["items"]], abs=1e-4)
    for other in (anybody, unheard):
        assert [item["item_id"] for item in other["items"]] == [item["item_id"] for item in stranger["items"]]
        assert [item["score"] for item in other["items"]] == pytest.approx([item["score"] for item in stranger["items"]], abs=1e-5)
    assert stranger["fallback"] is None
    assert unheard["unknown_items"] == ["gone"]
    scored = [
        body_of(answer)["scores"]
        for answer in answerer.score(
            [ScoreRequest(query="drama 7", candidates=["item-9"]), ScoreRequest(history=[], candidates=["item-9"])]
        )
    ]
    expected_scores = export.predictor.score([nobody], [_indices(9)], ["drama 7"])[0]
    for name, values in expected_scores.items():
        assert scored[0][0][name] == pytest.approx(float(values[0]), abs=1e-5)
    assert scored[1][0]["retrieval"] == export.predictor.popularity[9].item()


def test_a_version_without_queries_refuses_them(published: tuple[Export, Answerer]) -> None:
    _, answerer = published
    wrong, right = answerer.recommend([RecommendRequest(user_id="user-3", query="drama"), RecommendRequest(user_id="user-3")])
    assert wrong.status == 409
    assert json.loads(wrong.body)["detail"].startswith("query: this version was trained without queries")
    assert right.status == 200
    assert answerer.score([ScoreRequest(query="drama", candidates=["item-9"])])[0].status == 409


def _indices(*values: int) -> Any:
    return Sequences.of(values).items
