"""Settings that differ from a dataset, checkpoint or export are used or refused by name; the table of what verbs read is correct."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs.evaluate
import jobs.export
from recsys.config import Config, Section, load_config
from recsys.config.verb_settings import reads
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.launch.checks import check_training
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.load_recommender import load_trained
from recsys.train.loop import Trainer
from serve.app import read_arguments, version_in_service
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter
from tests.verbs import refusal_of
from tests.without_ray import patch_run_tasks, run_once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return make_dataset(Storage(str(folder / "store")))


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"storage.root={folder / 'store'}", f"run.scratch={folder / 'scratch'}", *overrides])


def trained(config: Config) -> str:
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.complete(config)
    state = Trainer(config, dataset, LocalReporter(), NextItem).run()
    return CheckpointStore(storage, config, dataset).uri(state.step)


SMALL = ("model.width=16", "model.text.mode=off", "training.num_workers=1", "training.global_batch_size=16", "training.micro_batch_size=16")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, dataset: Dataset) -> str:
    config = config_of(folder, f"data.dataset={dataset.uri}", "training.max_steps=2", *SMALL)
    return run_distributed(trained, 1, config)[0]


def test_a_shorter_history_is_used(folder: Path, dataset: Dataset) -> None:
    config = config_of(folder, f"data.dataset={dataset.uri}", "data.max_history=4", "training.max_steps=2", "run.name=short", *SMALL)
    uri = run_distributed(trained, 1, config)[0]
    manifest, saved, _, recommender = load_trained(Storage.from_config(config.storage), uri, config.run.scratch)
    assert manifest.config["data"]["max_history"] == saved.data.max_history == 4
    assert recommender.user_encoder.position.weight.shape[0] == 4
    again = config_of(folder, f"evaluation.checkpoint={uri}", "evaluation.baselines=[]")
    assert jobs.evaluate.run(again)["num_users"] > 0


@pytest.mark.parametrize("max_history", [2, 3, 10])
def test_every_target_stays_one_exactly_once(folder: Path, dataset: Dataset, max_history: int) -> None:
    """Check that the targets are those of the whole rows, and that no history exceeds the limit."""
    whole, cut = (
        list(targets_of(dataset.complete(config_of(folder, *SMALL, *overrides)), dataset))
        for overrides in ((), (f"data.max_history={max_history}",))
    )
    assert sorted(item for item, _ in cut) == sorted(item for item, _ in whole)
    assert max(places for _, places in cut) <= max_history

    assert max(places for _, places in whole) == 10


def targets_of(config: Config, dataset: Dataset) -> Iterator[tuple[int, int]]:
    """Yield each target's item with the length of the longest history of its batch."""
    reader = Reader(dataset, ItemFeatures.read(dataset, Path(config.run.scratch)), config, Share(0, 1, 1))
    for (batch,) in reader.steps(0):
        assert len(torch.unique(batch.sample_ids)) == len(batch.sample_ids)
        longest = max(length for _, length in batch.histories.groups)
        yield from ((item, longest) for item in batch.items[batch.targets].tolist())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.max_history=11"],
            r"data\.max_history = 11: the dataset .* was made with 10; prepare the data with it, or leave the key out",
        ),
        (["data.k_core=5"], None),
    ],
)
def test_what_contradicts_a_dataset_is_refused(folder: Path, dataset: Dataset, overrides: list[str], message: str | None) -> None:
    config = config_of(folder, f"data.dataset={dataset.uri}", *overrides)
    if message is None:  # this dataset carries no such key
        assert dataset.complete(config).data.k_core == 5
        return
    with pytest.raises(UserError, match=message):
        dataset.complete(config)
    with pytest.raises(UserError, match=message):
        check_training(config)


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.width=32",
            r"model\.width = 32: the checkpoint .* was made with 16; train with it under another run\.name, or leave the key out",
        ),
        ("data.max_history=5", r"data\.max_history = 5: the checkpoint .* was made with 10"),
        ("optimizer.learning_rate=0.5", r"optimizer\.learning_rate = 0\.5: the checkpoint"),
    ],
)
def test_what_contradicts_a_checkpoint_is_refused(folder: Path, checkpoint: str, verb: str, override: str, message: str) -> None:
    verbs: dict[str, Callable[[Config], Any]] = {"evaluate": jobs.evaluate.run, "export": jobs.export.run}
    with pytest.raises(UserError, match=message):
        verbs[verb](config_of(folder, f"{'evaluation' if verb == 'evaluate' else 'export'}.checkpoint={checkpoint}", override))


def test_another_dataset_than_the_checkpoints_is_refused(folder: Path, dataset: Dataset, checkpoint: str) -> None:
    other = make_dataset(dataset.storage, seed=1)
    with pytest.raises(UserError, match=rf"data\.dataset = {other.uri}: the checkpoint .* was trained on {dataset.uri}"):
        jobs.export.run(config_of(folder, f"export.checkpoint={checkpoint}", f"data.dataset={other.uri}"))


def test_what_agrees_is_taken_and_an_export_is_held_to_what_it_carries(folder: Path, dataset: Dataset, checkpoint: str) -> None:
    made = [f"data.dataset={dataset.uri}", "model.width=16", "run.name=agreed"]
    exported = jobs.export.run(config_of(folder, f"export.checkpoint={checkpoint}", *made))
    served = {"storage.root": str(folder / "store"), "service.export": "agreed", "model.width": 16}
    assert version_in_service(read_arguments(served)) == exported["version"]
    with pytest.raises(UserError, match=r"model\.width = 32: version .* was made with 16; train and export with it"):
        version_in_service(read_arguments(served | {"model.width": 32}))


def test_a_run_that_cannot_validate_is_refused_before_workers_start(folder: Path) -> None:
    storage = Storage(str(folder / "store"))
    untested = make_dataset(storage, num_users=12, num_items=40, seed=5)
    config = config_of(folder, f"data.dataset={untested.uri}", "model.text.mode=off")
    check_training(config)
    nobody = _without_validation(untested)
    for verb in ("jobs.train", "tune.search"):
        error = _refusal(verb, config_of(folder), nobody.uri)
        assert error.startswith("error: ")
        assert "no user has a validation target" in error
        error = _refusal(verb, config_of(folder), untested.uri, "--set=fairness.attribute=gender")
        assert "fairness.attribute = gender: has 0 values" in error


def _refusal(verb: str, config: Config, dataset: str, *more: str) -> str:
    settings = [f"--set=storage.root={config.storage.root}", f"--set=run.scratch={config.run.scratch}", f"--set=data.dataset={dataset}"]
    line, seconds = refusal_of(verb, *settings, "--set=model.text.mode=off", "--set=search.text_mode=['off']", *more)
    assert seconds < 10
    return line


def _without_validation(dataset: Dataset) -> Dataset:
    """Change the dataset so that every interaction is training data."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recsys.data.manifest import MANIFEST_NAME
    from recsys.store import join

    copied = dataset.uri + "-untested"
    users = dataset.read_users()
    lengths = pa.array([len(items) for items in users["items"].to_pylist()], pa.int32())
    for name, column in (("num_train", lengths), ("num_validation", pa.array([0] * len(lengths), pa.int32()))):
        users = users.set_column(users.column_names.index(name), name, column)
    Path(copied, "users").mkdir(parents=True)
    pq.write_table(users, Path(copied, "users", "0.parquet"))
    shards = {
        name: tuple(shard.model_copy(update={"dataset": dataset.name}) for shard in getattr(dataset.manifest, name))
        for name in ("train_shards", "catalogue_shards")
    }
    manifest = dataset.manifest.model_copy(update={"fingerprint": "untested", **shards})
    dataset.storage.write_bytes(join(copied, MANIFEST_NAME), manifest.model_dump_json().encode())
    return Dataset.open(dataset.storage, copied)


@contextmanager
def recorded(config: Config) -> Iterator[set[str]]:
    """Record which keys of this config object are read, not of configs derived from it."""
    places: dict[int, str] = {}

    def walk(section: Section, prefix: str) -> None:
        places[id(section)] = prefix
        for name in type(section).model_fields:
            value = object.__getattribute__(section, "__dict__")[name]
            if isinstance(value, Section):
                walk(value, f"{prefix}{name}.")

    walk(config, "")
    found: set[str] = set()
    original = Section.__getattribute__

    def read(section: Section, name: str) -> Any:
        value = original(section, name)
        if id(section) in places and name in type(section).model_fields and not isinstance(value, Section):
            found.add(places[id(section)] + name)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read)
        yield found


@pytest.mark.parametrize("verb", ["jobs.evaluate", "jobs.export", "jobs.prepare_data", "serve.deploy"])
def test_verbs_read_what_they_are_said_to_read(folder: Path, checkpoint: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)
    rows = "".join(f"u{user},i{item},{item}\n" for user in range(3) for item in range(5))
    (folder / "events.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    overrides = {
        "jobs.evaluate": [f"evaluation.checkpoint={checkpoint}"],
        "jobs.export": [f"export.checkpoint={checkpoint}", "run.name=agreed"],
        "jobs.prepare_data": [f"data.events={folder / 'events.csv'}"],
        "serve.deploy": ["service.export=agreed"],
    }
    config = config_of(folder, *overrides[verb])
    with recorded(config) as found:
        if verb == "jobs.evaluate":
            jobs.evaluate.run(config)
        elif verb == "jobs.export":
            jobs.export.run(config)
        elif verb == "jobs.prepare_data":
            prepare(config, Storage.from_config(config.storage))
        else:
            version_in_service(config)
    assert found
    assert {key for key in found if not reads(verb, key)} == set()
