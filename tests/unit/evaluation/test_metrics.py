"""The metrics against values worked out by hand and against a slow, plain computation."""

import math

import numpy as np
import pytest

from recsys.evaluation.metrics import bootstrap_interval, coverage, ranking_metrics, task_metrics


def test_one_target_per_user() -> None:
    metrics = ranking_metrics(np.array([[1], [3], [11]]), (10,))
    assert metrics["hr@10"].tolist() == [1, 1, 0]
    assert metrics["ndcg@10"].tolist() == [1, 0.5, 0]
    assert metrics["mrr@10"].tolist() == pytest.approx([1, 1 / 3, 0])
    assert metrics["recall@10"].tolist() == [1, 1, 0]


def test_several_targets_per_user_are_divided_by_the_best_that_is_possible() -> None:
    metrics = ranking_metrics(np.array([[2, 4, 30], [1, 2, 0]]), (5,))
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics["ndcg@5"].tolist() == pytest.approx([(1 / math.log2(3) + 1 / math.log2(5)) / ideal, 1.0])
    assert metrics["recall@5"].tolist() == pytest.approx([2 / 3, 1])
    assert metrics["hr@5"].tolist() == [1, 1]


def test_random_ranks_against_a_plain_computation() -> None:
    generator = np.random.default_rng(0)
    ranks = np.array([generator.choice(40, 4, replace=False) for _ in range(50)])  # 0 is: no target
    ranks[:, 0] += ranks.sum(1) == 0
    for k in (1, 5, 20):
        metrics = ranking_metrics(ranks, (k,))
        for user, row in enumerate(ranks):
            real = [rank for rank in row if rank]
            gain = sum(1 / math.log2(1 + rank) for rank in real if rank <= k)
            ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(real)) + 1))
            assert metrics[f"ndcg@{k}"][user] == pytest.approx(gain / ideal)
            assert metrics[f"mrr@{k}"][user] == pytest.approx(1 / min(real) if min(real) <= k else 0)


def test_coverage_counts_distinct_items_and_no_padding() -> None:
    assert coverage(np.array([[1, 2], [2, 0]]), 8) == 0.25


def test_bootstrap_interval_holds_the_mean_and_narrows_with_users() -> None:
    generator = np.random.default_rng(0)
    few, many = generator.random(50), generator.random(5000)
    low, high = bootstrap_interval(many)
    assert low < many.mean() < high
    assert high - low < np.diff(bootstrap_interval(few))[0]


def test_task_metrics() -> None:
    assert task_metrics("regression", np.array([1.0, 3.0]), np.array([2.0, 3.0])) == {"rmse": pytest.approx(math.sqrt(0.5))}
    binary = task_metrics("binary", np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.9, 0.1]))
    assert binary["auc"] == 0.5
    assert binary["logloss"] == pytest.approx(-(math.log(0.8) + math.log(0.9) + math.log(0.1)) / 3)
    assert "auc" not in task_metrics("binary", np.array([1.0, 1.0]), np.array([0.2, 0.9]))
