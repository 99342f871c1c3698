"""The metrics of tasks against scikit-learn and values worked out by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recsys.evaluation.task_metrics import calibration_error, task_metrics, user_auc

ONE_USER = np.zeros(3, np.int64)


def test_rmse_and_log_loss_by_hand() -> None:
    assert task_metrics("regression", np.array([1.0, 3.0]), np.array([2.0, 3.0]), ONE_USER[:2]) == {"rmse": pytest.approx(math.sqrt(0.5))}
    binary = task_metrics("binary", np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.9, 0.1]), ONE_USER)
    assert binary["auc"] == binary["uauc"] == 0.5
    assert binary["logloss"] == pytest.approx(-(math.log(0.8) + math.log(0.9) + math.log(0.1)) / 3)


def test_labels_of_one_class_have_no_auc() -> None:
    assert task_metrics("binary", np.ones(3), np.array([0.2, 0.9, 0.4]), ONE_USER).keys() == {"logloss", "ece"}


def test_user_auc_is_that_of_scikit_learn_for_each_user_with_both_classes() -> None:
    generator = np.random.default_rng(0)
    owners = generator.integers(0, 30, 200)
    labels = (generator.random(200) < 0.4).astype(float)
    predictions = generator.integers(0, 8, 200) / 8  # with ties
    expected = [
        roc_auc_score(labels[owners == owner], predictions[owners == owner])
        for owner in np.unique(owners)
        if len(np.unique(labels[owners == owner])) == 2
    ]
    assert 0 < len(expected) < 30
    assert user_auc(labels, predictions, owners).tolist() == pytest.approx(expected)
    assert task_metrics("binary", labels, predictions, owners)["uauc"] == pytest.approx(np.mean(expected))


def test_calibration_error_against_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    predictions = np.append(generator.random(500), [0.0, 1.0])
    labels = (generator.random(502) < predictions**2).astype(float)
    total = 0.0
    for step in range(15):
        inside = (predictions >= step / 15) & ((predictions < (step + 1) / 15) | (step == 14))
        if inside.any():
            total += inside.mean() * abs(labels[inside].mean() - predictions[inside].mean())
    assert calibration_error(labels, predictions) == pytest.approx(total)
    assert calibration_error(np.array([0.0, 1.0, 1.0, 0.0]), np.full(4, 0.5)) == 0
