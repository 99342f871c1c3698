"""Intervals and the paired test against scipy's."""

import itertools

import numpy as np
import pytest
import scipy.stats

from recsys.evaluation.significance import bootstrap_intervals, sign_flip_p


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    values = {"a": np.random.default_rng(0).random(200), "b": np.random.default_rng(1).exponential(size=200)}
    for name, interval in bootstrap_intervals(values).items():
        theirs = scipy.stats.bootstrap((values[name],), np.mean, method="percentile", rng=np.random.default_rng(2)).confidence_interval
        width = theirs.high - theirs.low
        assert interval == pytest.approx((theirs.low, theirs.high), abs=0.08 * width)


def test_intervals_narrow_with_users_and_are_the_same_each_time() -> None:
    values = np.random.default_rng(0).random(5000)
    few, many = bootstrap_intervals({"m": values[:50]})["m"], bootstrap_intervals({"m": values})["m"]
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert bootstrap_intervals({"m": values})["m"] == many


def test_p_of_sign_flips_is_near_the_share_over_all_flips() -> None:
    differences = np.array([[0.5, 0.1], [0.2, -0.3], [0.4, 0.2], [0.3, -0.1], [-0.1, 0.3], [0.6, -0.2], [0.1, 0.0], [0.2, 0.0]])
    flips = np.array(list(itertools.product([-1, 1], repeat=8)))
    exact = (np.abs(flips @ differences) >= np.abs(differences.sum(0)) - 1e-12).mean(0)
    assert sign_flip_p(differences).tolist() == pytest.approx(exact.tolist(), abs=0.01)


def test_p_agrees_with_scipys_paired_permutation_test_and_is_seeded() -> None:
    generator = np.random.default_rng(0)
    mine = generator.random(60)
    theirs = mine + generator.normal(0.01, 0.1, 60)
    expected = scipy.stats.permutation_test(
        (mine, theirs), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True, rng=generator
    ).pvalue
    assert 0.01 < expected < 0.9
    found = sign_flip_p((mine - theirs)[:, None])
    assert found[0] == pytest.approx(expected, abs=0.02)
    assert sign_flip_p((mine - theirs)[:, None]) == found


def test_equal_answers_and_clear_differences() -> None:
    assert sign_flip_p(np.stack([np.zeros(50), np.full(50, 0.1)], axis=1)).tolist() == pytest.approx([1.0, 1 / 10_001])
