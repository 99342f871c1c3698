"""Task labels of interactions. Does not import torch, since settings are checked without it."""

import numpy as np
from numpy.typing import NDArray

from recsys.data.manifest import DatasetManifest


def task_labels(manifest: DatasetManifest, events: NDArray[np.integer], values: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Return the labels of each task and their mask, both (N, T).

    `events` are kinds from 0, missing `values` are NaN. Regression labels are standardized over the training data. Tasks that only
    exposures have labels of are masked.
    """
    unlabelled = manifest.exposure_tasks if manifest.only_exposures_have_labels else ()
    labels, mask = np.zeros((2, len(values), len(manifest.tasks)), np.float32)
    has_value = ~np.isnan(values)
    known = np.where(has_value, values, np.float32(0))
    for column, task in enumerate(manifest.tasks):
        if task.event is not None:
            labels[:, column] = events >= manifest.event_kinds.index(task.event)
        elif task.threshold is not None:
            labels[:, column] = known >= task.threshold
        else:
            labels[:, column] = (known - manifest.value_mean) / manifest.value_std
        mask[:, column] = has_value if task.event is None else task.name not in unlabelled
    return labels, mask


def exposure_labels(manifest: DatasetManifest, labels: NDArray[np.integer], known: NDArray[np.integer]) -> tuple[NDArray[np.float32], ...]:
    """Return the labels of exposures by task and their mask, both (E, T), from their bits (E,)."""
    values, mask = np.zeros((2, len(labels), len(manifest.tasks)), np.float32)
    bits = {name: bit for bit, name in enumerate(manifest.exposure_tasks)}
    for column, task in enumerate(manifest.tasks):
        if task.name in bits:
            values[:, column], mask[:, column] = (labels >> bits[task.name]) & 1, (known >> bits[task.name]) & 1
    return values, mask
