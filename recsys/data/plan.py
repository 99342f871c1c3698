"""Which rank reads which samples in which step: a pure function of sizes, seed and epoch, without I/O.

The row groups of an epoch are permuted and concatenated. The result is cut into S streams whose lengths differ by at most one sample, and
each stream is shuffled within windows of some row groups. Sample m of the epoch is sample m // S of stream m % S. Step t holds samples t*G
to (t+1)*G; rank r of N reads those with m % N == r. Therefore:

- the order depends only on the dataset, the seed and the epoch, and a step holds the same samples for any N;
- if N divides S, a rank reads only its own streams and their row groups; otherwise it reads all row groups;
- (epoch, t) is the whole state: a run resumes after any step without reading earlier samples;
- every sample occurs once: the last step is smaller, and the ranks' shares of a step differ by at most one sample.

With `replay` an epoch has all samples of the newest row groups and, per sample of these, so many older ones. Slices of older row groups are
drawn without replacement by seed and epoch, and take the place of row groups in the above. Steps and row groups read then depend on
the newest data, not on the history.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter

import numpy as np

from recsys.arrays import Integers

SLICE_ROWS = 256
"""Maximum number of consecutive rows that a replay draws together, so that few row groups are decoded for it."""

MIN_SLICES = 48
"""A replay consists of at least so many slices, which are then shorter, so that it is spread over the history."""

MAX_DRAWN_FROM = 1 << 20
"""A draw is from about so many slices at most, which bounds its time and memory."""


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together: spans of row groups, at the places from `begin` to `end` of a stream."""

    stream: int
    number: int
    begin: int
    end: int
    spans: tuple[tuple[int, int, int], ...]  # (row group, first row, end row)

    @property
    def num_samples(self) -> int:
        """Number of rows in all spans."""
        return self.end - self.begin


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch. Sample ids count rows over all row groups in the manifest's order.

    `window` is the number of row groups that are shuffled together in a stream; 0 keeps the manifest's order, in one stream. Without
    `replay` an epoch has all samples; otherwise row groups before number `first_new` are older ones.
    """

    row_groups: tuple[int, ...]
    global_batch_size: int
    streams: int
    window: int
    seed: int
    epoch: int
    first_new: int = 0
    replay: float | None = None

    @property
    def num_streams(self) -> int:
        """Number of streams; 1 without shuffling."""
        return self.streams if self.window else 1

    @cached_property
    def num_samples(self) -> int:
        """Number of samples in the epoch; each occurs exactly once."""
        parts, _ = self._line
        return int((parts[:, 2] - parts[:, 1]).sum())

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps in the epoch; the last may hold fewer samples."""
        return -(-self.num_samples // self.global_batch_size)

    def numbers(self, first_step: int, last_step: int, rank: int = 0, world_size: int = 1) -> Integers:
        """Return the numbers, in the epoch's order, of a rank's samples in steps `first_step` to `last_step` (exclusive)."""
        begin = first_step * self.global_batch_size
        end = min(last_step * self.global_batch_size, self.num_samples)
        return np.arange(begin + (rank - begin) % world_size, end, world_size, dtype=np.int64)

    def step_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Integers:
        """Return the sample ids of one step, or of a rank's share of it, in order."""
        numbers = self.numbers(step, step + 1, rank, world_size)
        ids = np.empty(len(numbers), np.int64)
        for stream in np.unique(numbers % self.num_streams).tolist():
            is_here = numbers % self.num_streams == stream
            places = numbers[is_here] // self.num_streams
            windows = self.windows(stream)[self.window_at(stream, places[0]) : self.window_at(stream, places[-1]) + 1]
            ids[is_here] = np.concatenate([self.line_ids(window)[self.shuffle(window)] for window in windows])[places - windows[0].begin]
        return ids

    def windows(self, stream: int) -> tuple[Window, ...]:
        """Return the windows of a stream, in the order in which they are read."""
        if stream not in self._cut:
            self._cut[stream] = tuple(self._cut_stream(stream))
        return self._cut[stream]

    def window_at(self, stream: int, place: int) -> int:
        """Return the number of the window that holds a place of a stream; for a place past the end, the number of windows."""
        return bisect_right(self.windows(stream), place, key=attrgetter("end"))

    def line_ids(self, window: Window) -> Integers:
        """Return the sample ids of a window, unshuffled."""
        return np.concatenate([np.arange(start, stop) + self._group_begins[group] for group, start, stop in window.spans])

    def shuffle(self, window: Window) -> Integers:
        """Return the permutation of a window's rows."""
        if not self.window:
            return np.arange(window.num_samples)
        return _permutation(window.num_samples, (self.seed, self.epoch, window.stream, window.number))

    def _cut_stream(self, stream: int) -> Iterator[Window]:
        length, longer = divmod(self.num_samples, self.num_streams)
        begin = stream * length + min(stream, longer)
        end = begin + length + (stream < longer)
        parts, ends = self._line
        spans: list[tuple[int, int, int]] = []
        here = slice(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end, side="left")) + 1)
        for (group, first, last), part_end in zip(parts[here].tolist(), ends[here].tolist(), strict=True):
            start, stop = max(begin - part_end + last, first), min(end - part_end + last, last)
            if stop > start:
                spans.append((group, start, stop))
        place, width = 0, max(1, self.window)
        for number, index in enumerate(range(0, len(spans), width)):
            of_window = tuple(spans[index : index + width])
            first, place = place, place + sum(stop - start for _, start, stop in of_window)
            yield Window(stream, number, first, place, of_window)

    @cached_property
    def _cut(self) -> dict[int, tuple[Window, ...]]:
        return {}

    @cached_property
    def _group_begins(self) -> Integers:
        return np.cumsum(self.row_groups, dtype=np.int64) - np.asarray(self.row_groups, dtype=np.int64)

    @cached_property
    def _line(self) -> tuple[Integers, Integers]:
        """The parts of row groups (row group, first row, end row) in the epoch's order, and where each ends in their concatenation."""
        sizes = np.asarray(self.row_groups, dtype=np.int64)
        parts = np.stack([np.arange(len(sizes)), np.zeros_like(sizes), sizes], 1)
        if self.replay is not None:
            new = parts[self.first_new :]
            parts = np.concatenate([self._replayed(self.replay * int(new[:, 2].sum())), new])
        if self.window:
            parts = parts[np.random.default_rng((self.seed, self.epoch)).permutation(np.arange(len(parts)))]
        return parts, np.cumsum(parts[:, 2] - parts[:, 1])

    def _replayed(self, wanted: float) -> Integers:
        """Draw slices of older row groups with `wanted` samples in total, at most all; return them in the manifest's order."""
        sizes = np.asarray(self.row_groups[: self.first_new], dtype=np.int64)
        num_samples = round(min(wanted, int(sizes.sum())))
        rows = min(SLICE_ROWS, max(1, num_samples // MIN_SLICES, int(sizes.sum()) // MAX_DRAWN_FROM))
        counts = -(-sizes // rows)
        groups = np.repeat(np.arange(len(sizes)), counts)
        begins = (np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
        ends = np.minimum(begins + rows, sizes[groups])
        # Not one of the generators of two and four numbers above: to NumPy, missing numbers are zeros.
        order = np.random.default_rng((self.seed, self.epoch, 0, 0, 1)).permutation(len(groups))
        surplus = np.maximum(np.cumsum((ends - begins)[order]) - num_samples, 0)
        ends[order] -= np.minimum(surplus, (ends - begins)[order])
        return np.stack([groups, begins, ends], 1)[ends > begins]


@lru_cache(maxsize=64)
def _permutation(size: int, seeds: tuple[int, ...]) -> Integers:
    return np.random.default_rng(seeds).permutation(size)
