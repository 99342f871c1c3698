"""The group of a user attribute that each training sample belongs to."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Integers
from recsys.data.manifest import USER_INDEX, Dataset
from recsys.errors import UserError

MAX_GROUPS = 25
NO_GROUP = -1


def read_groups(dataset: Dataset, attribute: str) -> tuple[pa.Table, list[str], list[str]]:
    """Read the users with `num_train`, their values of one attribute, empty where not known, and the groups' names.

    Raises:
        UserError: no user has the attribute, or it has too many values to be groups.
    """
    users = dataset.read_users([USER_INDEX, "attributes", "num_train"])
    values = [dict(attributes or []).get(attribute) or "" for attributes in users["attributes"].to_pylist()]
    names = sorted(set(values) - {""})
    if not 1 < len(names) <= MAX_GROUPS:
        known = sorted({name for attributes in users["attributes"].to_pylist() for name, _ in attributes or []})
        raise UserError(
            f"fairness.attribute = {attribute}: has {len(names)} values in the users table, where 2 to {MAX_GROUPS} make groups; "
            f"attributes: {', '.join(known) or 'none'}"
        )
    return users, values, names


@dataclass(frozen=True)
class UserGroups:
    """The values of a user attribute, and which of them each training sample's user has."""

    names: tuple[str, ...]
    of_sample: NDArray[np.int8]  # (samples,) index into `names`, NO_GROUP where the attribute is not known
    shares: tuple[float, ...]  # of the training targets, by group

    @classmethod
    def read(cls, dataset: Dataset, attribute: str) -> "UserGroups":
        """Read one attribute of all users; a byte per training sample stays in memory.

        Raises:
            UserError: no user has the attribute, or it has too many values to be groups.
        """
        users, values, names = read_groups(dataset, attribute)
        number = {"": NO_GROUP} | {name: index for index, name in enumerate(names)}
        indices = users[USER_INDEX].to_numpy()
        of_user = np.full(int(indices.max()) + 1, NO_GROUP, np.int8)
        of_user[indices] = [number[value] for value in values]
        owners = [dataset.read_shard(shard, [USER_INDEX])[USER_INDEX].to_numpy() for shard in dataset.manifest.train_shards]
        num_targets = np.maximum(users["num_train"].to_numpy() - 1, 0)
        shares = [num_targets[of_user[indices] == group].sum() / num_targets.sum() for group in range(len(names))]
        return cls(tuple(names), of_user[np.concatenate(owners)], tuple(map(float, shares)))

    def mask(self, sample_ids: Integers) -> NDArray[np.float32]:
        """Return the group of each sample (N,) as a mask (N, G) of ones and zeros; a sample without a group has no one."""
        return (self.of_sample[sample_ids][:, None] == np.arange(len(self.names))).astype(np.float32)
