"""Cuts users' sequences into training windows."""

from dataclasses import dataclass

import numpy as np

from recsys.arrays import Integers


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


def gather_ranges(starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """Join ranges into (their positions one after another, the offset at which each begins)."""
    lengths = stops - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
    return positions.astype(np.int64), offsets
