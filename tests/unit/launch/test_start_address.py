"""What a run may start from and replay is checked before any worker starts."""

import json
from pathlib import Path

import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.exports.registry import Registry
from recsys.launch.checks import check_training
from recsys.store import Storage
from tests.datasets import make_dataset, small_config
from tests.verbs import refusal_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("start") / "store")))


def checkpoint(dataset: Dataset, name: str, **values: object) -> str:
    """Write the manifest of a checkpoint without files."""
    uri = dataset.storage.uri("runs", name, "checkpoints", "step-00000001")
    config = small_config(dataset, Path("scratch"), **values).model_dump(mode="json")
    dataset.storage.write_bytes(f"{uri}/manifest.json", json.dumps({"config": config, "world_size": 1}).encode())
    return uri


def export(dataset: Dataset, folder: Path) -> str:
    """Publish an export that has only a config."""
    (folder / "config.json").write_text(small_config(dataset, folder).model_dump_json())
    registry = Registry(dataset.storage, "shop")
    registry.publish(folder, "v1", {})
    return registry.uri("v1")


def test_a_checkpoint_or_an_export_of_the_same_width_is_accepted(dataset: Dataset, tmp_path: Path) -> None:
    for uri in (checkpoint(dataset, "good"), export(dataset, tmp_path)):
        check_training(small_config(dataset, tmp_path, training__start_from=uri))


def test_other_addresses_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    version, narrow = export(dataset, tmp_path), checkpoint(dataset, "narrow", model__width=8)
    unsharded = checkpoint(dataset, "unsharded", training__zero_stage=0)
    for uri, values, message in (
        (dataset.uri, {}, "is neither a checkpoint nor an export of this store"),
        (version.replace("v1", "v2"), {}, "export shop has no version 'v2'; published: v1"),
        (version, {"training__keep_optimizer": True}, "an export has no optimizer state"),
        (unsharded, {"training__keep_optimizer": True}, r"was trained with training\.zero_stage = 0"),
        (narrow, {}, r"has model\.width = 8, this run 16; set model\.width=8"),
    ):
        with pytest.raises(UserError, match=message):
            check_training(small_config(dataset, tmp_path, training__start_from=uri, **values))


def test_a_run_with_checkpoints_does_not_read_the_address(dataset: Dataset, tmp_path: Path) -> None:
    checkpoint(dataset, "mine")
    check_training(small_config(dataset, tmp_path, run__name="mine", training__start_from="/gone"))


def test_a_missing_address_is_refused_at_once(dataset: Dataset, tmp_path: Path) -> None:
    settings = (f"--set=storage.root={dataset.storage.root}", f"--set=data.dataset={dataset.uri}", f"--set=run.scratch={tmp_path}")
    line, seconds = refusal_of("jobs.train", *settings, "--set=training.start_from=/gone")
    assert "training.start_from = /gone: is neither a checkpoint nor an export of this store; give the 'checkpoint' that" in line
    assert seconds < 2


def test_the_first_version_has_nothing_to_replay(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the first version of its data, so there is nothing to replay"):
        check_training(small_config(dataset, tmp_path, training__replay=0.5))
    inherited = {
        name: tuple(shard.model_copy(update={"dataset": dataset.name}) for shard in getattr(dataset.manifest, name))
        for name in ("train_shards", "users_shards", "catalogue_shards")
    }
    manifest = dataset.manifest.model_copy(update={"version": 2, **inherited})
    dataset.storage.write_bytes(f"{dataset.uri}-2/manifest.json", manifest.model_dump_json().encode())
    with pytest.raises(UserError, match="adds no training sample to its base"):
        check_training(small_config(Dataset.open(dataset.storage, f"{dataset.uri}-2"), tmp_path, training__replay=0.5))


def test_the_optimizers_state_needs_a_source_and_a_stage_that_names_it() -> None:
    for settings, message in (
        (["training.keep_optimizer=true"], r"needs the checkpoint in training\.start_from"),
        (["training.keep_optimizer=true", "training.start_from=/a", "training.zero_stage=0"], r"needs training\.zero_stage >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, settings)
