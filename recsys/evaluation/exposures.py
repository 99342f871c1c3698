"""The exposures of a split with their labels: what tasks are measured on if the log has exposures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers, Scores
from recsys.data.manifest import USER_INDEX, Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences, ranges
from recsys.data.tasks import exposure_labels
from recsys.evaluation.users import READ_ROWS, EvaluationUser
from recsys.schema import EXPOSURE_COLUMNS

_COLUMNS = [USER_INDEX, *HISTORY_COLUMNS, *EXPOSURE_COLUMNS, "exposed_slices", "num_validation_exposures", "attributes"]
NOTHING: Integers = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ExposedTargets:
    """E exposures. `users` has one entry for each user and place in the history, whose targets are what was shown there."""

    users: list[EvaluationUser]
    labels: Scores  # (E, T) in the order of the users' targets
    mask: Scores  # (E, T)
    owners: Integers  # (E,) user index
    slices: list[list[str]]  # (E,) `column=value`

    @classmethod
    def read(cls, dataset: Dataset, split: str) -> "ExposedTargets":
        """Read the exposures of the validation or the test data."""
        parts = list(_read(dataset, split))
        tasks = len(dataset.manifest.tasks)
        labels, mask = (np.concatenate([np.zeros((0, tasks), np.float32), *(part[number] for part in parts)]) for number in (1, 2))
        owners = np.array([user.user_index for user, *_ in parts for _ in user.targets.items], np.int64)
        return cls([user for user, *_ in parts], labels, mask, owners, [own for part in parts for own in part[3]])

    def ordered(self, entries: Integers) -> "ExposedTargets":
        """Return the entries of `users` in another order."""
        lengths = np.array([len(user.targets.items) for user in self.users], np.int64)
        places = ranges((np.cumsum(lengths) - lengths)[entries], lengths[entries])
        slices = [self.slices[place] for place in places.tolist()]
        users = [self.users[entry] for entry in entries.tolist()]
        return ExposedTargets(users, self.labels[places], self.mask[places], self.owners[places], slices)


def _read(dataset: Dataset, split: str) -> Iterator[tuple[EvaluationUser, Scores, Scores, list[list[str]]]]:
    manifest = dataset.manifest
    tables = (
        (dataset.read_shard(shard, _COLUMNS) for shard in manifest.users_shards)
        if manifest.version == 1
        else (dataset.read_users(_COLUMNS),)
    )
    for table in tables:
        for batch in table.to_batches(READ_ROWS):
            rows = pa.Table.from_batches([batch])
            everything = Sequences.from_table(rows).cast(items=np.int64, events=np.int64)
            shown, histories = everything.exposures, everything[:]
            assert shown is not None
            num_validation = everything.scalars["num_validation_exposures"]
            begins, ends = (0, num_validation) if split == "validation" else (num_validation, shown.lengths)
            first = shown.offsets + (0 if split == "validation" else np.append(num_validation, 0))
            slices, attributes = rows["exposed_slices"].combine_chunks().flatten().to_pylist(), rows["attributes"].to_pylist()
            chosen = shown.within(begins, ends)
            for row in np.flatnonzero(chosen.lengths).tolist():
                own = chosen[row : row + 1]
                places = own.flat("places").astype(np.int64)
                order = np.argsort(places, kind="stable")
                for group in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
                    history = histories[row : row + 1].within(0, places[group[:1]])
                    targets = Sequences.of(own.items[group])
                    user = EvaluationUser(
                        int(everything.scalars[USER_INDEX][row]), history, targets, NOTHING, dict(attributes[row] or []), 0
                    )
                    labels, mask = exposure_labels(manifest, own.flat("labels")[group], own.flat("known")[group])
                    yield user, labels, mask, [slices[int(first[row]) + place] or [] for place in group.tolist()]
