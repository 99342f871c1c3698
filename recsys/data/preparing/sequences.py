"""Split points and training windows of users' sequences, as pure functions; reading and writing them is `prepare.py`."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.data_config import DataConfig

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A training sample `sequence[start:stop]`; from `first_target` on (counted from `start`) its interactions are targets."""

    start: int
    stop: int
    first_target: int


def cut_windows(length: int, max_history: int, stride: int, first: int = 1) -> list[Window]:
    """Cut a training sequence into windows in which every interaction from `first` on is a target exactly once.

    From the end backwards, a window holds at most `max_history + 1` interactions, its last `stride` or fewer being
    targets. A stride below `max_history` gives the targets more history and costs more samples. What comes before
    `first`, which is at least 1, is context.
    """
    windows = []
    stop = length
    while stop > first:
        start = max(0, stop - (max_history + 1))
        first_target = max(first, start + 1, stop - stride) - start
        windows.append(Window(start, stop, first_target))
        stop = start + first_target
    return windows


def split_counts(timestamps: Integers, offsets: Integers, data: DataConfig) -> tuple[Integers, Integers]:
    """Tell each user's number of training and of validation interactions; the rest are for testing.

    User u's interactions are `timestamps[offsets[u]:offsets[u + 1]]`. leave_one_out: the last is the test
    target and the one before it the validation target; a user with fewer than three is training data alone. time:
    training ends with the first interaction at or after `validation_from`, validation with the first at or after
    `test_from`; what an appended version adds late is held out where it follows what is.
    """
    lengths = np.diff(offsets)
    if data.split == "leave_one_out":
        has_targets = lengths >= 3
        return np.where(has_targets, lengths - 2, lengths), has_targets.astype(np.int64)
    num_train = _leading_before(timestamps, offsets, data.validation_from)
    return num_train, _leading_before(timestamps, offsets, data.test_from) - num_train


def _leading_before(timestamps: Integers, offsets: Integers, moment: int | None) -> Integers:
    """Count each user's interactions before the first that is at or after the moment."""
    lengths = np.diff(offsets)
    if moment is None:
        return np.zeros_like(lengths)
    late = np.flatnonzero(timestamps >= moment)
    firsts = np.append(late, len(timestamps))[np.searchsorted(late, offsets[:-1])]
    return np.asarray(np.minimum(firsts - offsets[:-1], lengths), np.int64)


def gather_ranges(starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """Join ranges into (their positions one after another, the offset at which each begins)."""
    lengths = stops - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
    return positions.astype(np.int64), offsets
