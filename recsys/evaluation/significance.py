"""Confidence intervals of means over users, and the p-value of a paired difference."""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from recsys.arrays import Floats

NUM_RESAMPLES = 1000
NUM_FLIPS = 10_000
_FLIP_BYTES_AT_ONCE = 1 << 19
_SEED = 0

Interval = tuple[float, float]


def resampled_counts(num_users: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Yield bootstrap resamples of the users, as the number of times that each is drawn (Efron 1979)."""
    for _ in range(NUM_RESAMPLES):
        yield np.bincount(generator.integers(0, num_users, num_users), minlength=num_users).astype(np.float64)


def resampled_means(values: Floats, generator: np.random.Generator) -> Floats:
    """Average over resampled users: (users, M) -> (resamples, M)."""
    return np.stack([counts @ values for counts in resampled_counts(len(values), generator)]) / len(values)


def interval_95(resamples: Floats) -> Interval:
    """Return the 95 % percentile interval of resampled numbers; NaN, where a resample has nothing to measure, is left out."""
    known = resamples[~np.isnan(resamples)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def bootstrap_intervals(values: Mapping[str, Floats]) -> dict[str, Interval]:
    """Return the 95 % percentile interval of the mean over users of each metric (users,); all metrics share the same resamples."""
    means = resampled_means(np.stack(list(values.values()), axis=1), np.random.default_rng(_SEED))
    return {name: interval_95(column) for name, column in zip(values, means.T, strict=True)}


def measure_intervals(measures: Mapping[str, Callable[[Floats], float]], num_users: int) -> dict[str, Interval]:
    """Return the same intervals for metrics that are functions of how often each user counts."""
    if not measures:
        return {}
    draws = resampled_counts(num_users, np.random.default_rng(_SEED))
    resamples = np.array([[measure(counts) for measure in measures.values()] for counts in draws])
    return {name: interval_95(column) for name, column in zip(measures, resamples.T, strict=True)}


def sign_flip_p(differences: Floats) -> Floats:
    """Return the two-sided p-values of paired differences (users, M) having the mean 0, by random sign flips (Fisher 1935).

    p = (1 + the number of flips whose mean is at least as far from 0 as the observed mean) / (1 + the number of flips).
    """
    generator = np.random.default_rng(_SEED)
    moving = differences[differences.any(axis=1)]  # flipping a 0 changes nothing
    total = moving.sum(axis=0)
    found = np.abs(total) * (1 - 1e-9)  # tolerates the rounding of sums in another order
    num_as_far = np.zeros(len(total))
    num_bytes = max(1, math.ceil(len(moving) / 8))
    at_once = max(1, _FLIP_BYTES_AT_ONCE // num_bytes)
    for begin in range(0, NUM_FLIPS, at_once):
        bits = np.frombuffer(generator.bytes(min(at_once, NUM_FLIPS - begin) * num_bytes), np.uint8)
        is_flipped = np.unpackbits(bits.reshape(-1, num_bytes), axis=1, count=len(moving))
        num_as_far += (np.abs(total - 2 * (is_flipped @ moving)) >= found).sum(axis=0)
    return (1 + num_as_far) / (1 + NUM_FLIPS)
