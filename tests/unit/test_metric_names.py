"""Names, directions and guards of metrics."""

import math

import pytest

from recsys.config import load_config
from recsys.errors import UserError
from recsys.metric_names import broken_guards, is_lower_better, oriented
from recsys.train.state import TrainingState


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ndcg@10", False),
        ("coverage@5", False),
        ("gini@10", True),
        ("popularity_lift@10", True),
        ("click.auc", False),
        ("click.logloss", True),
        ("a.b.rmse", True),
        ("rmse@10.auc", False),
    ],
)
def test_the_direction_of_a_metric(metric: str, expected: bool) -> None:
    assert is_lower_better(metric) is expected
    assert oriented(0.5, metric) == (-0.5 if expected else 0.5)


@pytest.mark.parametrize(
    ("change", "metric", "allowed", "is_broken"),
    [
        (-0.002, "click.auc", -0.002, False),
        (-0.003, "click.auc", -0.002, True),
        (0.5, "click.auc", -0.002, False),
        (0.01, "rating.rmse", 0.01, False),
        (0.02, "rating.rmse", 0.01, True),
        (-1.0, "rating.rmse", 0.0, False),
        (math.nan, "click.auc", -0.002, True),
    ],
)
def test_a_guard_allows_a_change_for_the_worse_up_to_its_value(change: float, metric: str, allowed: float, is_broken: bool) -> None:
    assert broken_guards({metric: change}, {metric: allowed}) == [metric] * is_broken
    assert broken_guards({}, {metric: allowed}) == [metric]


def test_the_best_epoch_is_that_of_the_lowest_error() -> None:
    state = TrainingState()
    for step, error in enumerate((0.9, 0.7, 0.8), start=1):
        state.step = step
        state.record_validation({"rating.rmse": error, "ndcg@10": 0.1}, "rating.rmse")
    assert (state.best_metric, state.best_step, state.epochs_without_improvement) == (0.7, 2, 1)
    assert state.score == -0.8


def test_an_epoch_that_breaks_a_guard_is_not_the_best() -> None:
    state, guards = TrainingState(), {"click.auc": -0.01}
    for step, (ndcg, auc) in enumerate(((0.1, 0.70), (0.2, 0.695), (0.4, 0.68), (0.3, 0.71)), start=1):
        state.step = step
        state.record_validation({"ndcg@10": ndcg, "click.auc": auc}, "ndcg@10", guards)
        assert state.best_step == (1, 2, 2, 4)[step - 1]
        assert state.score == (0.1, 0.2, 0.2, 0.3)[step - 1]
    assert [epoch.broken_guards for epoch in state.history] == [(), (), ("click.auc",), ()]
    assert TrainingState.model_validate_json(state.model_dump_json()) == state


def test_a_metric_that_the_validation_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"'click.auc' is not among the validation's: ndcg@10"):
        TrainingState().record_validation({"ndcg@10": 0.1}, "ndcg@10", {"click.auc": 0.0})


def test_guards_are_given_as_a_table_or_as_keys() -> None:
    table = load_config(None, ['evaluation.guards={"click.auc" = -0.002}'])
    keys = load_config(None, ["evaluation.guards.click.auc=-0.002"])
    assert table.evaluation.guards == keys.evaluation.guards == {"click.auc": -0.002}
    assert table.with_values({"run.name": "other"}).evaluation.guards == table.evaluation.guards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.metric=ndcg@7"], "ndcg@10, ndcg@20, click.auc would work"),
        (["evaluation.metric=click"], "auc, uauc, logloss, ece, rmse of a task"),
        (["evaluation.metric=.auc"], "of a task"),
        (['evaluation.guards={"click.auc" = 0.1}'], "click.auc = 0.1 is an improvement, as higher is better; -0.1 would work"),
        (['evaluation.guards={"rating.rmse" = -0.1}'], "is an improvement, as lower is better; 0.1 would work"),
        (['evaluation.guards={"like" = -0.1}'], "evaluation.guards = 'like' must be"),
    ],
)
def test_refused_metrics_and_guards(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings)


@pytest.mark.parametrize(("metric", "expected"), [("hr@5", "hr@5"), ("click.auc", "ndcg@10"), ("coverage@5", "ndcg@10")])
def test_slices_use_a_metric_of_ranks(metric: str, expected: str) -> None:
    assert load_config(None, [f"evaluation.metric={metric}"]).evaluation.ranking_metric == expected
    assert load_config(None, ["evaluation.cutoffs=[7,20]", "evaluation.metric=click.auc"]).evaluation.ranking_metric == "ndcg@7"
