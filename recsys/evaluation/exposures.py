"""The exposures of a split with their labels: what tasks are measured on if the log has exposures."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from recsys.arrays import Integers, Scores
from recsys.data.labels.exposures import read_held_out
from recsys.data.labels.tasks import exposure_labels
from recsys.data.manifest import Dataset
from recsys.data.sequences import ASKED, Sequences, ranges
from recsys.evaluation.users import EvaluationUser

NOTHING: Integers = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ExposedTargets:
    """E exposures. `users` has one entry for each user, place in the history and context, whose targets are what was shown there."""

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
    for found in read_held_out(dataset, split):
        shown, histories = found.histories.exposures, replace(found.histories, exposures=None)
        assert shown is not None
        for row in np.flatnonzero(shown.lengths).tolist():
            own, first = shown[row : row + 1], int(shown.offsets[row])
            places, contexts = own.flat("places").astype(np.int64), own.flat("contexts")
            order = np.lexsort((contexts, places))
            is_first = (np.diff(places[order]) != 0) | (np.diff(contexts[order]) != 0)
            for group in np.split(order, np.flatnonzero(is_first) + 1):
                history, targets = histories[row : row + 1].within(0, places[group[:1]]), Sequences.of(own.items[group])
                history = replace(history, scalars={ASKED: contexts[group[:1]]})
                user = EvaluationUser(found.user_indices[row], history, targets, NOTHING, found.attributes[row], 0)
                labels, mask = exposure_labels(dataset.manifest, own.flat("labels")[group], own.flat("known")[group])
                yield user, labels, mask, [list(found.slices[first + place]) for place in group.tolist()]
