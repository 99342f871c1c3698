"""prepare_data on a real Ray: synthetic and real data end to end, one-line errors from tasks, equal results anywhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.conftest import local_ray

pytestmark = pytest.mark.ray

REAL = Path(__file__).parents[3] / "shared" / "data"
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
TINY = ["data.source=synthetic", "data.synthetic.num_users=600", "data.synthetic.num_items=50", "data.synthetic.mean_events=10"]


@pytest.fixture(scope="module", autouse=True)
def _ray(aws_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield


def prepared(root: Path, *overrides: str, config: Path | None = None) -> Dataset:
    made: Config = load_config(config, [f"storage.root={root}", *overrides])
    return prepare(made, Storage.from_config(made.storage))


def test_synthetic_end_to_end_is_the_same_under_two_roots_and_skipped_when_made(tmp_path: Path) -> None:
    first, second = prepared(tmp_path / "one", *TINY), prepared(tmp_path / "two", *TINY)
    assert first.manifest.num_users == 600
    assert first.manifest.num_items == 50
    assert first.manifest.fingerprint == second.manifest.fingerprint
    columns = ["user_index", "user_id", "items", "events", "timestamps"]
    assert first.read_users(columns).equals(second.read_users(columns))
    before = {entry.uri: entry.etag for entry in first.storage.list(first.uri)}
    assert prepared(tmp_path / "one", *TINY).manifest == first.manifest
    assert {entry.uri: entry.etag for entry in first.storage.list(first.uri)} == before


@pytest.mark.parametrize("s3_storage", ["moto", pytest.param("rclone", marks=pytest.mark.slow)], indirect=True)
def test_s3_gives_what_a_folder_gives(tmp_path: Path, s3_storage: Storage) -> None:
    local = prepared(tmp_path, *TINY)
    made = load_config(None, [f"storage.root={s3_storage.root}", f"storage.endpoint={s3_storage.endpoint}", *TINY])
    stored = prepare(made, Storage.from_config(made.storage))
    assert stored.manifest.fingerprint == local.manifest.fingerprint
    assert stored.catalogue.equals(local.catalogue)
    assert stored.read_users(["items", "events"]).equals(local.read_users(["items", "events"]))


def test_an_error_in_a_task_reaches_the_caller_as_one_line(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,timestamp\na,1,1\na,2\n")
    with pytest.raises(UserError) as error:
        prepared(tmp_path / "store", f"data.events={path}")
    assert str(error.value).startswith(f"{path}: the record in line 3 has 2 fields; its header has 3")


def real_inputs(folder: str, suffixes: dict[str, str]) -> list[str]:
    if not (REAL / folder).exists():
        pytest.skip(f"{REAL / folder} is absent")
    return [f"data.{role}={REAL / folder / name}" for role, name in suffixes.items()]


def counts(dataset: Dataset) -> tuple[int, int, int]:
    manifest = dataset.manifest
    assert sum(dataset.catalogue["train_count"].to_pylist()) == manifest.num_targets + manifest.num_users
    return manifest.num_users, manifest.num_items, manifest.num_interactions


def test_movielens_100k(tmp_path: Path) -> None:
    inputs = real_inputs("ml-100k", {"events": "ml-100k.inter", "items": "ml-100k.item", "users": "ml-100k.user"})
    dataset = prepared(tmp_path, *inputs, config=CONFIGS / "ml-100k.toml")
    assert counts(dataset) == (943, 1682, 100_000)
    assert dataset.manifest.number_columns == ("release_year",)
    assert dataset.manifest.num_targets == 100_000 - 3 * 943
    assert [task.name for task in dataset.manifest.tasks] == ["rating", "like"]


def test_movielens_100k_split_at_random(tmp_path: Path) -> None:
    inputs = real_inputs("ml-100k", {"events": "ml-100k.inter", "items": "ml-100k.item", "users": "ml-100k.user"})
    dataset = prepared(tmp_path, *inputs, "data.split=random", config=CONFIGS / "ml-100k.toml")
    rows = dataset.read_users(["items", "timestamps", "num_train", "num_validation"]).to_pylist()
    num_train, num_validation = (sum(row[name] for row in rows) for name in ("num_train", "num_validation"))
    assert (100_000 - num_train - num_validation) / 100_000 == pytest.approx(0.25, abs=0.006)
    assert num_validation / (num_train + num_validation) == pytest.approx(0.05, abs=0.004)
    assert counts(dataset) == (943, 1682, 100_000)
    for row in rows:
        train, validation = row["num_train"], row["num_train"] + row["num_validation"]
        for part in (row["timestamps"][:train], row["timestamps"][train:validation], row["timestamps"][validation:]):
            assert part == sorted(part)
    report = dataset.storage.read_bytes(f"{dataset.uri}/report.html").decode()
    assert "draws from all of a user" in report
    assert 'class="state fail"' not in report


def test_withheld_items_are_cold_for_some_test_users_of_movielens_1m(tmp_path: Path) -> None:
    tables = {"events": "events.parquet", "items": "items.parquet", "users": "users.parquet"}
    dataset = prepared(tmp_path, *real_inputs("ml-1m", tables), "data.withheld_items=0.1")
    manifest = dataset.manifest
    is_cold = dataset.catalogue["train_count"].to_numpy() == 0
    assert manifest.num_items == 3416
    assert manifest.noticed["withheld_item"] == pytest.approx(341.6, abs=70)
    assert is_cold.sum() >= manifest.noticed["withheld_item"]
    assert manifest.num_interactions + manifest.rejected["withheld"] == 999_611
    users = dataset.read_users(["items", "num_train", "num_validation"]).to_pylist()
    assert {(row["num_validation"], len(row["items"]) - row["num_train"]) for row in users} == {(1, 2)}
    share = sum(is_cold[row["items"][-1] - 1] for row in users) / len(users)
    assert share == pytest.approx(0.1, abs=0.05)


def test_movielens_1m_and_beauty(tmp_path: Path) -> None:
    tables = {"events": "events.parquet", "items": "items.parquet"}
    movies = prepared(tmp_path, *real_inputs("ml-1m", {**tables, "users": "users.parquet"}))
    assert counts(movies) == (6040, 3416, 999_611)
    beauty = prepared(tmp_path, *real_inputs("beauty", tables))
    assert counts(beauty) == (22_363, 12_101, 198_502)
    assert not beauty.manifest.has_time
