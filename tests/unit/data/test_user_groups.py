"""Groups of users: every sample is in its user's group, unknown values are in none, unusable attributes are refused."""

import numpy as np
import pytest

from recsys.data.labels.training import UserGroups
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.store import Storage
from tests.datasets import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


def attributes(dataset: Dataset) -> dict[int, dict[str, str]]:
    rows = dataset.read_users(["user_index", "attributes"]).to_pylist()
    return {row["user_index"]: dict(row["attributes"] or []) for row in rows}


def test_a_sample_is_in_its_users_group(dataset: Dataset) -> None:
    known = attributes(dataset)
    name = sorted(next(iter(known.values())))[0]
    groups = UserGroups.read(dataset, name)
    owners = np.concatenate([dataset.read_shard(shard)["user_index"].to_numpy() for shard in dataset.manifest.train_shards])
    mask = groups.mask(np.arange(len(owners)))
    assert mask.sum() > 0
    for row, owner in zip(mask, owners.tolist(), strict=True):
        expected = known[owner].get(name) or ""
        assert [group for group, is_in in zip(groups.names, row, strict=True) if is_in] == ([expected] if expected else [])
    assert sum(groups.shares) == pytest.approx(1.0) or "" in {values.get(name) or "" for values in known.values()}


def test_an_attribute_that_nobody_has_is_refused_with_those_that_there_are(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"fairness\.attribute = shoe_size: has 0 values"):
        UserGroups.read(dataset, "shoe_size")
