"""Full ranking: seen items removed, ties by index, targets that were seen before are none."""

import numpy as np
import pytest
import torch

from recsys.config import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.evaluation.evaluator import EvaluationUser, Ranked, rank_users, read_evaluation_users, summarise, target_ranks
from recsys.predictor import History
from recsys.storage import Storage
from tests.datasets import make_dataset


def user(history: list[int], targets: list[int]) -> EvaluationUser:
    return EvaluationUser(History.of(history), History.of(targets), np.zeros(len(targets), np.float32), {})


@pytest.mark.parametrize(
    ("scores", "history", "targets", "ranks"),
    [
        ([5, 4, 3, 2, 1], [], [1], [1]),
        ([5, 4, 3, 2, 1], [], [4], [4]),
        ([5, 4, 3, 2, 1], [1, 2], [4], [2]),  # what was seen is not ranked
        ([3, 3, 3, 3, 3], [], [4], [4]),  # equal scores: the lower index first
        ([3, 3, 3, 3, 3], [2], [4], [3]),
        ([5, 4, 3, 2, 1], [], [2, 4], [2, 4]),
        ([5, 4, 3, 2, 1], [], [4, 4], [4]),  # twice the same target is one
    ],
)
def test_target_ranks(scores: list[float], history: list[int], targets: list[int], ranks: list[int]) -> None:
    row = np.array([-np.inf, *scores], np.float32)
    assert target_ranks(row, user(history, targets)).tolist() == ranks


def test_rank_users_agrees_with_sorting_the_whole_catalogue() -> None:
    generator = np.random.default_rng(0)
    table = torch.from_numpy(generator.integers(0, 5, (20, 31)).astype(np.float32))
    table[:, 0] = -torch.inf
    users = [user(generator.choice(np.arange(1, 16), 4, replace=False).tolist(), [int(generator.integers(16, 31))]) for _ in range(20)]
    rows = iter(table.split(7))
    ranked = rank_users(lambda histories: next(rows), users, EvaluationConfig(batch_size=7))
    for row, one, ranks, top in zip(table.numpy(), users, ranked.ranks, ranked.top, strict=True):
        order = [item for item in sorted(range(1, 31), key=lambda item: (-row[item], item)) if item not in one.history.items]
        assert ranks.tolist() == [order.index(int(one.targets.items[0])) + 1]
        assert top.tolist() == order[:20]


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_users(lambda histories: torch.full((1, 5), torch.nan), [user([1], [2])], EvaluationConfig())


def test_leave_one_out_targets(tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset: Dataset = make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))
    rows = {tuple(row["items"]): row for row in dataset.read_users().to_pylist()}
    for split, back in (("validation", 2), ("test", 1)):
        users = read_evaluation_users(dataset, split)
        assert users
        for one in users:
            row = next(row for items, row in rows.items() if items[:-back] == tuple(one.history.items))
            assert one.targets.items.tolist() == [row["items"][-back]]
            assert row["items"][-back] not in row["items"][:-back]
            assert one.attributes["group"] in ("even", "odd")


def test_parts_join_to_the_whole() -> None:
    parts = [Ranked(np.array([[1, 2]]), np.array([[5]])), Ranked(np.array([[3]]), np.array([[6]]))]
    joined = Ranked.join(parts)
    assert joined.ranks.tolist() == [[1, 2], [3, 0]]
    assert summarise(joined, EvaluationConfig(), num_items=10)["coverage@5"] == 0.2
