"""Lists with filters, pages, boosts, diversity; similar items, ranked candidates and batches: each against the predictor's own numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.evaluation.diversity import content_vectors, diversified
from recsys.evaluation.ranking import NUM_CANDIDATES
from recsys.exports.files import Export
from recsys.exports.registry import Registry
from recsys.predictor import Rule
from recsys.store import Storage
from serve.answers.answering import Answerer
from serve.api.problems import Answer
from serve.api.protocol import BatchRequest, Boost, RankRequest, RecommendRequest, SimilarRequest
from tests.datasets import GENRES
from tests.exports import publish_export, service_config

NUM_ITEMS = 60


@pytest.fixture(scope="module", params=["retrieval", "blend"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Answerer]:
    config = service_config(tmp_path_factory.mktemp("lists"))
    blend = {"ranking.num_candidates": 15, "ranking.blend": {"retrieval": 1.0, "like": 2.0}} if request.param == "blend" else {}
    export = publish_export(config, "v1", values=blend)
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    return export, Answerer.load(registry, "v1", "production", Path(config.run.scratch))


def read(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer
    return json.loads(answer.body)


def ask(answerer: Answerer, **request: Any) -> dict[str, Any]:
    (answer,) = answerer.answer([RecommendRequest(**request)])
    return read(answer)


def ids(found: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in found["items"]]


USERS = st.sampled_from(["user-3", "user-7", "user-11", "nobody"])
EXPRESSIONS = st.one_of(
    st.sampled_from(GENRES).map(lambda genre: {"genre": genre}),
    st.lists(st.sampled_from(GENRES), min_size=1, max_size=3).map(lambda genres: {"not": {"genre": genres}}),
    st.just({"genre": {"exists": False}}),
    st.just({"genre": ["opera"]}),
)


@given(user=USERS, expression=EXPRESSIONS, limit=st.integers(1, NUM_ITEMS), is_seen_out=st.booleans())
def test_a_filter_gives_k_items_whenever_k_qualify(
    served: tuple[Export, Answerer], user: str, expression: dict[str, Any], limit: int, is_seen_out: bool
) -> None:
    export, answerer = served
    found = ask(answerer, user_id=user, filter=expression, limit=limit, exclude_seen=is_seen_out)
    mask = answerer.filters.mask(expression)
    history = export.profiles.find(user)
    seen = set(history.items.tolist()) if is_seen_out and history is not None else set()
    qualified = [item for item in np.flatnonzero(mask).tolist() if item not in seen]
    listed = [answerer.predictor.item_index[item_id] for item_id in ids(found)]
    assert len(listed) == len(set(listed)) == min(limit, len(qualified))
    assert set(listed) <= set(qualified)
    if history is not None:
        exclude = np.array(sorted(seen), np.int64)
        (expected,) = export.predictor.recommend([history], limit, [exclude], rules=[Rule(mask)])
        assert listed == expected.items.tolist()
        np.testing.assert_allclose([item["score"] for item in found["items"]], expected.scores, atol=1e-6)


@given(user=USERS, expression=st.one_of(st.none(), EXPRESSIONS), limit=st.integers(1, 20), diversity=st.sampled_from([0.0, 0.4]))
def test_pages_never_repeat_and_end_with_the_last_item(
    served: tuple[Export, Answerer], user: str, expression: dict[str, Any] | None, limit: int, diversity: float
) -> None:
    _, answerer = served
    request = {"user_id": user, "filter": expression, "limit": limit, "diversity": diversity}
    whole = set(ids(ask(answerer, **request | {"limit": NUM_ITEMS})))
    pages, token = [], None
    while True:
        found = ask(answerer, **request, page_token=token)
        pages.append(ids(found))
        token = found["next_page_token"]
        if token is None:
            break
        assert len(pages[-1]) == limit
    shown = [item for page in pages for item in page]
    assert len(shown) == len(set(shown))
    assert set(shown) == whole


def test_pages_of_a_plain_list_are_the_list(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    whole = ids(ask(answerer, user_id="user-3", limit=12))
    first = ask(answerer, user_id="user-3", limit=6)
    second = ask(answerer, user_id="user-3", limit=6, page_token=first["next_page_token"])
    if answerer.predictor.config.ranking.num_candidates:  # the blend orders the best candidates of what is left
        assert not set(ids(first)) & set(ids(second))
    else:
        assert ids(first) + ids(second) == whole


def test_a_page_token_of_items_that_are_gone_hides_nothing(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    found = ask(answerer, user_id="user-3", limit=5, page_token="AAAAAAAA" * 3)
    assert ids(found) == ids(ask(answerer, user_id="user-3", limit=5))
    for token in ("?", "AAAA", "\u00fcn\u00ef", "a" * 9):
        with pytest.raises(ValidationError, match="page_token"):
            RecommendRequest(user_id="user-3", page_token=token)


def test_a_boost_adds_to_scores_before_the_cut(served: tuple[Export, Answerer]) -> None:
    export, answerer = served
    boosted = ask(answerer, user_id="user-3", limit=10, boost=[Boost(filter={"genre": "drama"}, by=100.0)])
    drama = np.flatnonzero(answerer.filters.mask({"genre": "drama"}))
    assert {answerer.predictor.item_index[item] for item in ids(boosted)} <= set(drama.tolist())
    history = export.profiles.find("user-3")
    assert history is not None
    boost = np.zeros(NUM_ITEMS + 1, np.float32)
    boost[drama] = 100
    (expected,) = export.predictor.recommend([history], 10, [np.unique(history.items)], rules=[Rule(None, boost)])
    np.testing.assert_allclose([item["score"] for item in boosted["items"]], expected.scores, rtol=1e-6)
    kept = ask(answerer, user_id="user-3", limit=10, boost=[Boost(filter={"genre": "opera"}, by=100.0)])
    assert ids(kept) == ids(ask(answerer, user_id="user-3", limit=10))


def test_only_included_items_and_none_of_the_excluded(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    wanted = [f"item-{number}" for number in range(1, 30)]
    found = ask(answerer, user_id="nobody", include_ids=[*wanted, "gone"], exclude_ids=["item-5", "lost"], limit=40)
    assert set(ids(found)) == set(wanted) - {"item-5"}
    assert found["unknown_items"] == ["gone"]
    assert ids(ask(answerer, user_id="user-3", include_ids=[])) == []


def test_diversity_is_that_of_evaluation(served: tuple[Export, Answerer]) -> None:
    export, answerer = served
    history = export.profiles.find("user-7")
    assert history is not None
    seen = np.unique(history.items)
    (whole,) = export.predictor.recommend([history], NUM_CANDIDATES, [seen])
    vectors = content_vectors(export.predictor.catalogue)
    assert vectors is not None
    (expected,) = diversified(whole.items[None], whole.scores[None].astype(np.float64), vectors, "mmr", [0.5], 8)[0]
    found = ask(answerer, user_id="user-7", limit=8, diversity=0.5)
    assert [answerer.predictor.item_index[item] for item in ids(found)] == expected.tolist()
    assert ids(found) != ids(ask(answerer, user_id="user-7", limit=8))


def test_an_answer_says_where_it_is_from(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    plain, whole, unknown = (
        ask(answerer, user_id=user, limit=2, include=include)
        for user, include in (("user-3", []), ("user-3", ["scores", "fields"]), ("nobody", []))
    )
    assert len({found["recommendation_id"] for found in (plain, whole, unknown)}) == 3
    assert {(found["version"], found["variant"]) for found in (plain, whole, unknown)} == {("v1", "default")}
    first, rich, popular = (found["items"][0] for found in (plain, whole, unknown))
    assert (first["source"], first["scores"], first["fields"]) == ("model", None, None)
    assert set(rich["fields"]["genre"]) <= set(GENRES)
    if answerer.predictor.config.ranking.num_candidates:
        assert first["ranking"] == first["score"] != first["retrieval"]
        assert rich["scores"].keys() == {"retrieval", "purchase", "rating", "like"}
    else:
        assert (first["ranking"], first["retrieval"]) == (None, first["score"])
    assert (popular["source"], popular["retrieval"], unknown["fallback"]) == ("popularity", None, "popularity")


def test_similar_items_have_the_nearest_vectors(served: tuple[Export, Answerer]) -> None:
    export, answerer = served
    vectors = export.predictor.item_vectors.numpy()[1:]
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = (directions @ directions[8]).astype(np.float32)
    found = read(answerer.answer([SimilarRequest(item_id="item-9", limit=5)])[0])
    order = [item for item in np.argsort(-expected, kind="stable") if item != 8][:5]
    assert ids(found) == [f"item-{item + 1}" for item in order]
    np.testing.assert_allclose([item["score"] for item in found["items"]], expected[order], atol=1e-5)
    filtered = read(answerer.answer([SimilarRequest(item_id="item-9", limit=60, filter={"genre": "drama"})])[0])
    drama = set(np.flatnonzero(answerer.filters.mask({"genre": "drama"})).tolist()) - {9}
    assert {answerer.predictor.item_index[item] for item in ids(filtered)} == drama
    (unknown,) = answerer.answer([SimilarRequest(item_id="gone")])
    assert unknown.status == 404


def test_candidates_are_ranked_as_recommendations_are(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    candidates = ["item-9", "gone", "item-2", "item-30", "item-9"]
    found = read(answerer.answer([RankRequest(user_id="user-3", candidates=candidates)])[0])
    expected = ask(answerer, user_id="user-3", include_ids=candidates, exclude_seen=False)
    assert ids(found) == ids(expected)
    assert set(ids(found)) == {"item-9", "item-2", "item-30"}
    assert found["unknown_items"] == ["gone"]
    assert found["next_page_token"] is None


def test_a_batch_has_each_list_and_distinct_lists_share_no_item(served: tuple[Export, Answerer]) -> None:
    _, answerer = served
    requests = [RecommendRequest(user_id=f"user-{number}", limit=8) for number in (3, 3, 7)]
    wrong = RecommendRequest(user_id="user-3", filter={"colour": "red"})
    plain = read(answerer.answer([BatchRequest(requests=[*requests, wrong])])[0])["results"]
    assert [ids(found) for found in plain[:3]] == [ids(ask(answerer, user_id=f"user-{number}", limit=8)) for number in (3, 3, 7)]
    assert plain[3]["status"] == 409
    distinct = read(answerer.answer([BatchRequest(requests=requests, distinct=True)])[0])["results"]
    shown = [item for found in distinct for item in ids(found)]
    assert len(shown) == len(set(shown)) == 24
    assert ids(distinct[0]) == ids(plain[0])


def test_masks_of_recent_filters_are_kept_within_a_limit(served: tuple[Export, Answerer], monkeypatch: pytest.MonkeyPatch) -> None:
    _, answerer = served
    monkeypatch.setattr("serve.answers.answering.MASKS_BYTES", 3 * (NUM_ITEMS + 1))
    for genre in (*GENRES, *GENRES):
        ask(answerer, user_id="user-3", filter={"genre": genre})
    assert len(answerer._masks) == 3
