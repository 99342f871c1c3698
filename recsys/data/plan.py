"""Who reads which samples at which step: a pure function of sizes, seed and epoch, without I/O.

The order of an epoch depends on the row group sizes, the seed and the epoch alone, never on the number of ranks: row
groups are permuted, and samples are shuffled within windows of `window` row groups. Step t holds samples t*G to
(t+1)*G of that order, and chunk c of C of a step holds every C-th of them. The state of a run in its data is therefore
(epoch, step), and a run may go on with another number of ranks.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch. Sample ids count rows over all row groups in the manifest's order."""

    row_groups: tuple[int, ...]
    global_batch_size: int
    window: int
    seed: int
    epoch: int

    @property
    def num_samples(self) -> int:
        """Samples in the epoch; each occurs exactly once."""
        return sum(self.row_groups)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the epoch; the last may hold fewer samples."""
        return -(-self.num_samples // self.global_batch_size)

    def step_ids(self, step: int) -> Indices:
        """Return the sample ids of one step, in order."""
        begin = step * self.global_batch_size
        end = min(begin + self.global_batch_size, self.num_samples)
        first = int(np.searchsorted(self._window_ends, begin, side="right"))
        last = int(np.searchsorted(self._window_ends, end, side="left"))
        ids = np.concatenate([self._window_ids(window) for window in range(first, last + 1)])
        offset = begin - (int(self._window_ends[first - 1]) if first else 0)
        return ids[offset : offset + end - begin]

    def chunk_ids(self, step: int, chunk: int, num_chunks: int) -> Indices:
        """Return one of `num_chunks` interleaved parts of a step; a rank's micro batch is one chunk."""
        return self.step_ids(step)[chunk::num_chunks]

    def locate(self, ids: Indices) -> tuple[Indices, Indices]:
        """Return the row group of each sample id, and its row there."""
        groups = np.searchsorted(self._group_ends, ids, side="right").astype(np.int64)
        return groups, ids - self._group_begins[groups]

    @cached_property
    def _group_ends(self) -> Indices:
        return np.cumsum(self.row_groups, dtype=np.int64)

    @cached_property
    def _group_begins(self) -> Indices:
        return self._group_ends - np.asarray(self.row_groups, dtype=np.int64)

    @cached_property
    def _group_order(self) -> Indices:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.row_groups))

    @cached_property
    def _window_ends(self) -> Indices:
        sizes = np.asarray(self.row_groups, dtype=np.int64)[self._group_order]
        return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.window)))

    def _window_ids(self, window: int) -> Indices:
        groups = self._group_order[window * self.window : (window + 1) * self.window]
        return _shuffled_window(tuple((int(self._group_begins[g]), self.row_groups[g]) for g in groups), self.seed, self.epoch, window)


@lru_cache(maxsize=4)
def _shuffled_window(spans: tuple[tuple[int, int], ...], seed: int, epoch: int, window: int) -> Indices:
    ids = np.concatenate([np.arange(begin, begin + size, dtype=np.int64) for begin, size in spans])
    return np.random.default_rng((seed, epoch, window + 1)).permutation(ids)
