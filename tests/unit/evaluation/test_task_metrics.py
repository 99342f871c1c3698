"""Task metrics compared with scikit-learn and with values computed by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from recsys.evaluation.significance import measure_intervals
from recsys.evaluation.tasks import calibration_error, task_measures, user_auc

ONE_USER = np.zeros(3, np.int64)
Values = np.ndarray


def metrics_of(kind: str, labels: Values, predictions: Values, owners: Values) -> dict[str, float]:
    return {name: measure(np.ones(owners.max() + 1)) for name, measure in task_measures(kind, labels, predictions, owners).items()}


@pytest.fixture
def answers() -> tuple[Values, Values, Values]:
    """Return labels, predictions with ties, and the user of each."""
    generator = np.random.default_rng(0)
    owners = generator.integers(0, 30, 200)
    return (generator.random(200) < 0.4).astype(float), generator.integers(0, 9, 200) / 8, owners


def test_rmse_and_log_loss_by_hand() -> None:
    assert metrics_of("regression", np.array([1.0, 3.0]), np.array([2.0, 3.0]), ONE_USER[:2]) == {"rmse": pytest.approx(math.sqrt(0.5))}
    binary = metrics_of("binary", np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.9, 0.1]), ONE_USER)
    assert binary["auc"] == binary["uauc"] == 0.5
    assert binary["logloss"] == pytest.approx(-(math.log(0.8) + math.log(0.9) + math.log(0.1)) / 3)


def test_labels_of_one_class_have_no_auc() -> None:
    assert metrics_of("binary", np.ones(3), np.array([0.2, 0.9, 0.4]), ONE_USER).keys() == {"logloss", "ece"}


def test_auc_and_log_loss_are_those_of_scikit_learn_for_any_weights(answers: tuple[Values, Values, Values]) -> None:
    labels, predictions, owners = answers
    predictions = predictions.astype(np.float32).astype(np.float64)
    measures = task_measures("binary", labels, predictions, owners)
    for counts in (np.ones(30), np.random.default_rng(1).integers(0, 4, 30).astype(float)):
        assert measures["auc"](counts) == pytest.approx(roc_auc_score(labels, predictions, sample_weight=counts[owners]))
        expected = log_loss(labels, predictions.astype(np.float32), sample_weight=counts[owners])  # a sure but wrong one costs -log(eps)
        assert measures["logloss"](counts) == pytest.approx(expected, rel=1e-5)


def test_user_auc_is_that_of_scikit_learn_for_each_user_with_both_classes(answers: tuple[Values, Values, Values]) -> None:
    labels, predictions, owners = answers
    users, areas = user_auc(labels, predictions, owners)
    assert users.tolist() == [owner for owner in range(30) if len(np.unique(labels[owners == owner])) == 2]
    assert 0 < len(users) < 30
    assert areas.tolist() == pytest.approx([roc_auc_score(labels[owners == user], predictions[owners == user]) for user in users])
    assert metrics_of("binary", labels, predictions, owners)["uauc"] == pytest.approx(areas.mean())


def test_calibration_error_against_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    predictions = np.append(generator.random(500), [0.0, 1.0])
    labels = (generator.random(502) < predictions**2).astype(float)
    total = 0.0
    for step in range(15):
        inside = (predictions >= step / 15) & ((predictions < (step + 1) / 15) | (step == 14))
        if inside.any():
            total += inside.mean() * abs(labels[inside].mean() - predictions[inside].mean())
    assert calibration_error(labels, predictions, np.ones(502)) == pytest.approx(total)
    assert calibration_error(np.array([0.0, 1.0, 1.0, 0.0]), np.full(4, 0.5), np.ones(4)) == 0


def test_an_interval_is_that_of_measuring_resampled_users_again(answers: tuple[Values, Values, Values]) -> None:
    labels, predictions, owners = answers
    found = measure_intervals(task_measures("binary", labels, predictions, owners), 30)
    generator, resamples = np.random.default_rng(5), []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(owners == user) for user in generator.integers(0, 30, 30)])
        resamples.append(roc_auc_score(labels[rows], predictions[rows]))
    low, high = np.percentile(resamples, [2.5, 97.5])
    assert found["auc"] == pytest.approx((low, high), abs=0.1 * (high - low))
