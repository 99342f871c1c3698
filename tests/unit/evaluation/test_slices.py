"""Slices: which users and targets belong to each, compared with plain loops over the users."""

import numpy as np
import pytest

from recsys.config.evaluation import EvaluationConfig
from recsys.data.sequences import Sequences
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import Ranked, rank_users
from recsys.evaluation.slices import (
    COLD,
    COLD_AMONG_COLD,
    MIN_SLICE_USERS,
    WARM,
    WARM_AMONG_WARM,
    evaluate_slices,
    find_slices,
    popularity_deciles,
)
from recsys.evaluation.users import EvaluationUser
from tests.users import evaluation_user

NUM_ITEMS = 40
TRAIN_COUNT = np.array([0, *([0] * 8), *range(1, NUM_ITEMS - 7)])  # items 1 to 8 are cold


def make_users(num_users: int = 60) -> list[EvaluationUser]:
    """Return users with two targets; for every third user one of them is cold."""
    generator = np.random.default_rng(0)
    users = []
    for index in range(num_users):
        warm = generator.permutation(np.arange(9, NUM_ITEMS + 1)).tolist()
        cold = generator.permutation(np.arange(1, 9)).tolist()
        history = [*warm[: int(generator.integers(1, 20))], *cold[: index % 2]]
        targets = [warm[25], cold[5] if index % 3 == 0 else warm[26]]
        attributes = {"shop": "a" if index % 2 else "b", "zip": str(index)} if index % 5 else {}
        users.append(evaluation_user(index, Sequences.of(history), Sequences.of(targets), attributes, 0))
    return users


def ranked_at_random(users: list[EvaluationUser]) -> Ranked:
    generator = np.random.default_rng(1)
    scores = lambda batch: generator.random((len(batch), NUM_ITEMS + 1)).astype(np.float32)  # noqa: E731
    return rank_users(scores, users, EvaluationConfig(), TRAIN_COUNT == 0)


def test_cold_targets_count_by_themselves_among_all_and_among_the_cold() -> None:
    users = make_users()
    ranked, slices = ranked_at_random(users), find_slices(users, TRAIN_COUNT)
    members = [index for index in range(len(users)) if index % 3 == 0]
    assert np.flatnonzero(slices[COLD].is_member).tolist() == members
    found = evaluate_slices(slices, ranked, "ndcg@10")
    for name, ranks in ((COLD, ranked.ranks), (COLD_AMONG_COLD, ranked.group_ranks)):
        own = [[int(ranks[index][np.unique(users[index].targets.items) <= 8][0])] for index in members]
        expected = ranking_metrics(np.array(own), (10,))
        assert found[name]["num_users"] == len(members)
        for metric in ("ndcg@10", "hr@10"):
            assert found[name][metric] == expected[metric].mean()
            low, high = found[name]["interval_95"][metric]
            assert low <= found[name][metric] <= high


def test_what_a_random_order_gives_is_what_random_scores_come_near() -> None:
    users = make_users(3000)
    found = evaluate_slices(find_slices(users, TRAIN_COUNT), ranked_at_random(users), "ndcg@5")
    assert found[COLD_AMONG_COLD]["random"]["hr@5"] > 3 * found[COLD]["random"]["hr@5"]
    for name in (COLD, COLD_AMONG_COLD, WARM, WARM_AMONG_WARM):
        for metric in ("ndcg@5", "hr@5"):
            assert abs(found[name][metric] - found[name]["random"][metric]) < 0.03, name


def test_a_random_order_is_one_of_the_unseen_candidates() -> None:
    users = make_users()
    found = evaluate_slices(find_slices(users, TRAIN_COUNT), ranked_at_random(users), "ndcg@5")
    cold_users = [user for index, user in enumerate(users) if index % 3 == 0]
    unseen = [set(range(1, NUM_ITEMS + 1)) - set(user.history.items.tolist()) for user in cold_users]
    assert found[COLD]["random"]["hr@5"] == pytest.approx(np.mean([5 / len(items) for items in unseen]))
    unseen_cold = [len([item for item in items if item <= 8]) for items in unseen]
    assert set(unseen_cold) == {7, 8}
    assert found[COLD_AMONG_COLD]["random"]["hr@5"] == pytest.approx(np.mean([5 / number for number in unseen_cold]))


def test_warm_targets_are_the_others() -> None:
    users = make_users()
    slices = find_slices(users, TRAIN_COUNT)
    expected = [int((user.targets.items > 8).sum()) for user in users]
    assert slices[WARM].is_target.sum(1).tolist() == slices[WARM_AMONG_WARM].is_target.sum(1).tolist() == expected
    assert not (slices[WARM].is_target & slices[COLD].is_target).any()
    no_cold = find_slices(users, TRAIN_COUNT + 1)
    assert WARM in no_cold
    assert not {COLD, COLD_AMONG_COLD, WARM_AMONG_WARM} & no_cold.keys()  # without cold items these slices are omitted


def test_users_by_history_and_attribute() -> None:
    users = make_users()
    slices = find_slices(users, TRAIN_COUNT)
    short = [len(user.history.items) <= 10 for user in users]
    assert slices["history 1-10"].is_member.tolist() == short
    assert slices["shop a"].is_member.tolist() == [user.attributes.get("shop") == "a" for user in users]
    assert slices["shop unknown"].is_member.sum() == 12
    assert not [name for name in slices if name.startswith(("zip", "history over"))]  # too many values; no users
    assert all(each.is_member.sum() >= MIN_SLICE_USERS for each in slices.values())


def test_deciles_hold_a_tenth_of_the_interactions_each() -> None:
    deciles = popularity_deciles(TRAIN_COUNT)
    assert deciles[TRAIN_COUNT == 0].tolist() == [0] * 9
    warm = np.argsort(-TRAIN_COUNT, kind="stable")[: NUM_ITEMS - 8]
    assert deciles[warm].tolist() == sorted(deciles[warm])  # the most popular items first
    shares = np.bincount(deciles, TRAIN_COUNT, 11)[1:] / TRAIN_COUNT.sum()
    assert np.abs(shares - 0.1).max() < TRAIN_COUNT.max() / TRAIN_COUNT.sum()
    users = make_users()
    slices = find_slices(users, TRAIN_COUNT)
    members = slices["popularity decile 10"].is_target
    assert members.sum() == sum(int((deciles[user.targets.items] == 10).sum()) for user in users)
