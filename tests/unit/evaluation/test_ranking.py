"""Full ranking: seen items removed, ties broken by index, cold items ranked among themselves."""

import numpy as np
import pytest

from recsys.config.evaluation import EvaluationConfig
from recsys.data.sequences import Sequences
from recsys.evaluation.ranking import Ranked, rank_users, summarize, target_ranks
from recsys.evaluation.users import EvaluationUser
from tests.users import evaluation_user


def user(history: list[int], targets: list[int]) -> EvaluationUser:
    return evaluation_user(0, Sequences.of(history), Sequences.of(targets), {}, 0)


@pytest.mark.parametrize(
    ("scores", "history", "targets", "ranks"),
    [
        ([5, 4, 3, 2, 1], [], [1], [1]),
        ([5, 4, 3, 2, 1], [], [4], [4]),
        ([5, 4, 3, 2, 1], [1, 2], [4], [2]),  # seen items are not ranked
        ([3, 3, 3, 3, 3], [], [4], [4]),  # equal scores: the lower index is first
        ([3, 3, 3, 3, 3], [2], [4], [3]),
        ([5, 4, 3, 2, 1], [], [2, 4], [2, 4]),
        ([5, 4, 3, 2, 1], [], [4, 4], [4]),  # a repeated target counts once
        ([5, -np.inf, -np.inf, 1, 0], [], [3], [5]),  # a score of -inf is the worst; it does not exclude the item
    ],
)
def test_target_ranks(scores: list[float], history: list[int], targets: list[int], ranks: list[int]) -> None:
    row = np.array([np.inf, *scores], np.float32)  # padding is never a candidate, even with the highest score
    assert target_ranks(row, user(history, targets))[0].tolist() == ranks


def test_targets_are_ranked_among_the_unseen_items_of_their_like_too() -> None:
    scores = np.array([9, 5, 4, 4, 2, 1, 7], np.float32)
    is_cold = np.array([False, False, True, True, True, False, True])
    ranks, group_ranks = target_ranks(scores, user([6], [3, 4, 5]), is_cold)
    assert ranks.tolist() == [3, 4, 5]
    assert group_ranks.tolist() == [2, 3, 2]  # cold: 6 is seen, 2 ties with 3 and is first; warm: 1 is before 5


def test_rank_users_agrees_with_sorting_the_whole_catalogue() -> None:
    generator = np.random.default_rng(0)
    table = generator.integers(0, 5, (20, 31)).astype(np.float32)
    is_cold = np.arange(31) % 3 == 0
    users = [user(generator.choice(np.arange(1, 16), 4, replace=False).tolist(), [int(generator.integers(16, 31))]) for _ in range(20)]
    rows = iter(np.split(table, [7, 14]))
    ranked = rank_users(lambda batch: next(rows), users, EvaluationConfig(batch_size=7), is_cold)
    for number, (row, one) in enumerate(zip(table, users, strict=True)):
        order = [item for item in sorted(range(1, 31), key=lambda item: (-row[item], item)) if item not in one.history.items]
        target = int(one.targets.items[0])
        assert ranked.ranks[number].tolist() == [order.index(target) + 1]
        like = [item for item in order if is_cold[item] == is_cold[target]]
        assert ranked.group_ranks[number].tolist() == [like.index(target) + 1]
        assert ranked.top[number].tolist() == order[:20]
        assert ranked.top_scores[number].tolist() == row[order[:20]].tolist()


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_users(lambda users: np.full((1, 5), np.nan, np.float32), [user([1], [2])], EvaluationConfig())


def ranked_of(ranks: list[list[int]], top: list[list[int]]) -> Ranked:
    return Ranked(np.array(ranks), np.zeros_like(ranks), np.array(top), np.zeros_like(top, np.float32))


def test_parts_join_to_the_whole() -> None:
    joined = Ranked.join([ranked_of([[1, 2], [7, 8]], [[5], [5]]).head(1), ranked_of([[3]], [[6]])])
    assert joined.ranks.tolist() == [[1, 2], [3, 0]]
    assert summarize(joined, EvaluationConfig(), num_items=10)["coverage@5"] == 0.2
