"""The files of an export: the catalogue with the counts of all versions, as plain Parquet."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.config import load_config
from recsys.data.manifest import Shard
from recsys.data.sequences import HISTORY_COLUMNS
from recsys.exports.files import load_export, write_export
from recsys.model.recommender import build_recommender
from recsys.schema import CATALOGUE_SCHEMA
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.datasets import make_dataset
from tests.exports import users_of


def test_an_export_of_release_0_1_is_read(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    config = load_config(None, ["model.width=16", "data.max_history=10", "model.text.mode=off"])
    recommender = build_recommender(config, dataset, torch.device("cpu")).eval()
    (folder := tmp_path / "export").mkdir()
    write_export(build_predictor(config, dataset, recommender), recommender.state_dict(), dataset, folder, num_golden=2)
    (folder / "users.arrow").unlink()
    pq.write_table(dataset.read_users(["user_id", *HISTORY_COLUMNS]), folder / "users.parquet")
    users = dict(load_export(folder).profiles.items())
    assert {user_id: history.items.tolist() for user_id, history in users.items()} == {
        user_id: history.items.tolist() for user_id, history in users_of(dataset).items()
    }


def test_an_export_holds_the_catalogue_of_all_versions(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    path = Path(dataset.uri) / "counts" / "0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"item_index": pa.array([2, 40], pa.int32()), "count": pa.array([100, 1], pa.int64())}), path)
    shard = Shard(path="counts/0.parquet", row_groups=(2,), num_bytes=path.stat().st_size, sha256="counts")
    fields = {"version": 2, "fingerprint": "counted", "count_shards": (shard,)}
    appended = dataclasses.replace(dataset, manifest=dataset.manifest.model_copy(update=fields))
    config = load_config(None, ["model.width=16", "data.max_history=10", "model.text.mode=off", f"run.scratch={tmp_path / 'scratch'}"])
    recommender = build_recommender(config, appended, torch.device("cpu")).eval()
    predictor = build_predictor(config, appended, recommender)
    folder = tmp_path / "export"
    folder.mkdir()
    write_export(predictor, recommender.state_dict(), appended, folder, num_golden=2)
    written = pq.read_table(folder / "catalogue.parquet")
    assert written.schema.equals(CATALOGUE_SCHEMA)
    assert written.drop_columns("numbers").equals(appended.catalogue.drop_columns("numbers"))  # NaN is not equal to itself
    shared, alone = (load_export(folder, scratch).predictor for scratch in (tmp_path / "served", None))
    histories = list(users_of(appended).values())
    torch.testing.assert_close(shared.score_catalogue(histories), predictor.score_catalogue(histories), rtol=0, atol=0)
    torch.testing.assert_close(alone.score_catalogue(histories), predictor.score_catalogue(histories), rtol=0, atol=0)
    assert shared.item_index == alone.item_index == {f"item-{index}": index for index in range(1, 41)}
    assert shared.popularity[2] == dataset.catalogue["train_count"][1].as_py() + 100
