"""Choosing the best trial, and the number of concurrent trials."""

import math

import pytest

from recsys.config import load_config
from tune.select import Trial, concurrent_trials, leaderboard, winner
from tune.space import search_space, trial_config


def trial(name: str, metric: float | None, checkpoint: str | None = "there", status: str = "finished") -> Trial:
    return Trial(name, {}, status, 3, metric, checkpoint)


def test_the_best_finite_metric_with_a_checkpoint_wins() -> None:
    trials = [
        trial("a", 0.1),
        trial("b", math.nan),
        trial("c", None),
        trial("d", 0.3),
        trial("e", 0.9, checkpoint=None),
        trial("f", math.inf),
    ]
    assert winner(trials, "ndcg@10") == trials[3]
    assert [one.name for one in leaderboard(trials, "ndcg@10")][:2] == ["d", "a"]


def test_the_lowest_error_wins() -> None:
    trials = [trial("a", 0.9), trial("b", 0.7), trial("c", None), trial("d", 0.8)]
    assert [one.name for one in leaderboard(trials, "rating.rmse")] == ["b", "d", "a", "c"]
    assert winner(trials, "rating.rmse") == trials[1]


def test_a_tie_goes_to_the_first_name_and_a_stopped_trial_may_win() -> None:
    trials = [trial("b", 0.5), trial("a", 0.5), trial("c", 0.7, status="stopped")]
    assert [one.name for one in leaderboard(trials, "ndcg@10")] == ["c", "a", "b"]


@pytest.mark.parametrize("trials", [[], [trial("a", None)], [trial("a", math.nan)]])
def test_no_valid_trial_no_winner(trials: list[Trial]) -> None:
    assert winner(trials, "ndcg@10") is None


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "cpus", "gpus", "limit", "expected"),
    [(6, 0, 3, 0, None, 2), (6, 0, 3, 0, 1, 1), (64, 4, 3, 2, None, 2), (2, 0, 3, 0, None, 1), (64, 8, 3, 2, 3, 3)],
)
def test_the_scarcer_resource_limits(num_cpus: float, num_gpus: float, cpus: float, gpus: float, limit: int | None, expected: int) -> None:
    assert concurrent_trials(num_cpus, num_gpus, cpus, gpus, limit) == expected


def test_a_sample_alone_decides_the_trials_run() -> None:
    config = load_config()
    sample = {
        "optimizer.learning_rate": 0.002,
        "model.width": 32,
        "model.dropout": 0.1,
        "model.loss.kind": "full",
        "model.text.mode": "off",
    }
    assert sample.keys() == search_space(config.search).keys()
    first, again = trial_config(config, "one", sample), trial_config(config, "one", dict(reversed(sample.items())))
    other = trial_config(config, "one", {**sample, "model.width": 64})
    assert first.run.name == again.run.name != other.run.name
    assert trial_config(config, "two", sample).run.name != first.run.name
    assert (first.model.width, first.optimizer.learning_rate) == (32, 0.002)
