"""The items that are not recommended again: the one rule for evaluation, batch scoring and the service. Does not import torch."""

import numpy as np

from recsys.arrays import Integers
from recsys.data.manifest import DatasetManifest
from recsys.data.sequences import Sequences


class SeenRule:
    """Which items of a history are seen: those of events whose kind has `marks_seen`, for `seen_seconds` after the event if that is set."""

    def __init__(self, manifest: DatasetManifest) -> None:
        kinds = manifest.kind_table
        self._marks = np.array([kind.marks_seen for kind in kinds])
        self._limits = np.array([np.inf if kind.seen_seconds is None else kind.seen_seconds for kind in kinds])
        self._marks_all = bool(self._marks.all())
        self._expires = manifest.has_time and bool(np.isfinite(self._limits).any())

    def __call__(self, history: Sequences, now: int | None = None) -> Integers:
        """Return the distinct seen items of one user at the time `now`, sorted; without a time, nothing expires."""
        items = history.items
        if self._marks_all and not self._expires:
            return np.unique(items)
        is_seen = self._marks[history.events]
        if self._expires and now is not None:
            is_seen &= now - history.timestamps <= self._limits[history.events]
        return np.unique(items[is_seen])
