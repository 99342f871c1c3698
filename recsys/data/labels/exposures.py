"""Exposures of a dataset: those of the training samples, and those held out for validation and test. Does not import torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from recsys.data.manifest import USER_INDEX, Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.schema import EXPOSURE_COLUMNS, PROFILE_COLUMNS

_HELD_OUT = [USER_INDEX, *HISTORY_COLUMNS, *EXPOSURE_COLUMNS, "exposed_slices", "num_validation_exposures", "attributes"]
"""Columns of users, besides profiles."""


@dataclass(frozen=True)
class HeldOut:
    """Some users with their whole histories and their exposures in one split."""

    histories: Sequences  # (R,) with `exposures`
    user_indices: Sequence[int]  # (R,)
    slices: Sequence[Sequence[str]]  # (E,) `column=value` of each exposure
    attributes: Sequence[dict[str, str]]  # (R,)


def read_held_out(dataset: Dataset, split: str) -> Iterator[HeldOut]:
    """Read the exposures of the validation or the test data, some users at a time; the dataset must have exposures."""
    for rows in dataset.user_batches([*_HELD_OUT, *(PROFILE_COLUMNS if dataset.manifest.profiles else ())]):
        everything = Sequences.from_table(rows).cast(items=np.int64, events=np.int64)
        shown, num_validation = everything.exposures, everything.scalars["num_validation_exposures"]
        assert shown is not None
        chosen = shown.within(0, num_validation) if split == "validation" else shown.within(num_validation, shown.lengths)
        texts = rows["exposed_slices"].combine_chunks().flatten()
        slices = [own or [] for own in texts.take(pa.array(chosen.starts[chosen.owners] + chosen.positions)).to_pylist()]
        histories = replace(everything, scalars={}, exposures=chosen)
        yield HeldOut(histories, rows[USER_INDEX].to_pylist(), slices, [dict(own or []) for own in rows["attributes"].to_pylist()])


def read_trained(dataset: Dataset) -> Iterator[tuple[Sequences, np.ndarray]]:
    """Read the training samples with their exposures, shard by shard, and the user index of each sample."""
    for shard in dataset.manifest.train_shards:
        samples = Sequences.from_table(dataset.read_shard(shard, [USER_INDEX, *HISTORY_COLUMNS, *EXPOSURE_COLUMNS]))
        yield samples.cast(items=np.int64, events=np.int64), samples.scalars[USER_INDEX]
