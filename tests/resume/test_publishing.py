"""Asynchronously published checkpoints: their content, and their state after a kill at any moment."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.load_recommender import load_trained
from recsys.train.checkpoints.manifest import read_manifest
from recsys.train.failures import TrainingError
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics, Request
from tests.checkpoints import store_of
from tests.datasets import make_dataset, small_config
from tests.distributed import RankError, run_distributed, run_until_killed
from tests.reporters import LocalReporter

STEPS = 14
EVERY = 3


def config_of(folder: Path, name: str = "run", **values: object) -> Config:
    base = {
        "run__name": name,
        "training__num_workers": 2,
        "training__micro_batch_size": 4,
        "training__max_steps": STEPS,
        "checkpoint__every_steps": EVERY,
        "checkpoint__keep_last": 20,
    }
    return small_config(make_dataset(Storage(str(folder / "store")), num_users=300), folder, **base | values)


class Watching(LocalReporter):
    """Records after each step which checkpoints are published."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__()
        self.store, self.published = store, dict[int, list[int]]()

    def step(self, step: int, losses: Metrics, batches: Any) -> None:
        self.published[step + 1] = self.store.steps()


def run(config: Config, prepare: Callable[[], None] = lambda: None) -> tuple[dict[int, list[int]], dict[str, str]]:
    """Train to the end; return what was published after each step, and the hashes of the last checkpoint."""
    prepare()
    store = store_of(config)
    reporter = Watching(store)
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    torch.distributed.barrier()
    newest = store.newest()
    assert newest is not None
    assert newest.state.step == STEPS
    return reporter.published, {file.path: file.sha256 for file in newest.files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the hashes of an uninterrupted run's last checkpoint."""
    hashes: dict[str, str] = run_distributed(run, 2, config_of(tmp_path_factory.mktemp("undisturbed")))[0][1]
    return hashes


def slow_uploads() -> None:
    upload = Storage.upload

    def slow(self: Storage, path: Path, uri: str) -> None:
        time.sleep(0.5)
        upload(self, path, uri)

    Storage.upload = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))])
def test_training_goes_on_while_a_checkpoint_is_uploaded_and_does_not_change_it(tmp_path: Path, zero_stage: int) -> None:
    slow = config_of(tmp_path, "slow", training__zero_stage=zero_stage)
    published, hashes = run_distributed(run, 2, slow, slow_uploads)[0]
    assert EVERY not in published[EVERY + 1]  # the step after it was made without waiting
    assert EVERY in published[2 * EVERY + 1]
    fast = config_of(tmp_path, "fast", training__zero_stage=zero_stage)
    assert run_distributed(run, 2, fast)[0][1] == hashes
    for step in (EVERY, 3 * EVERY):
        first, second = (
            load_trained(Storage.from_config(each.storage), store_of(each).uri(step), each.run.scratch) for each in (slow, fast)
        )
        assert first[0].state.step == step
        for name, tensor in first[3].state_dict().items():
            assert torch.equal(tensor, second[3].state_dict()[name]), name


class Asking(LocalReporter):
    """Makes one request, in the last step of the first epoch."""

    def __init__(self, asked: Request, last_step: int) -> None:
        super().__init__()
        self.asked, self.last_step, self.num_steps = asked, last_step, 0

    def request(self) -> Request:
        self.num_steps += 1
        return self.asked if self.num_steps == self.last_step else Request.NONE


def run_asking(config: Config, asked: Request) -> int:
    """Train with this reporter; return the number of steps per epoch."""
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    last_step = -(-dataset.manifest.num_samples // config.training.global_batch_size)
    with pytest.raises(TrainingError, match=r"^stopped") if asked == Request.STOP else nullcontext():
        Trainer(config, dataset, Asking(asked, last_step), NextItem).run()
    return last_step


@pytest.mark.parametrize("asked", [Request.SAVE, Request.STOP])
def test_what_is_asked_for_in_an_epochs_last_step_is_done_before_its_validation(tmp_path: Path, asked: Request) -> None:
    values = {"training__num_workers": 1, "checkpoint__every_steps": 10_000, "training__epochs": 2, "training__max_steps": 10_000}
    plain, config = (config_of(tmp_path, name, **values) for name in ("plain", "asked"))
    last_step = run_distributed(run_asking, 1, plain, Request.NONE)[0]
    run_distributed(run_asking, 1, config, asked)
    if asked == Request.STOP:
        newest = store_of(config).newest()
        assert newest is not None
        assert (newest.state.step, newest.state.validation) == (last_step, {})
        run_distributed(run_asking, 1, config, Request.NONE)
    assert store_of(plain).steps() == [last_step, 2 * last_step]
    for step in store_of(plain).steps():
        first, second = (read_manifest(Storage.from_config(each.storage), store_of(each).uri(step)) for each in (plain, config))
        assert first.state.validation == second.state.validation != {}
        assert {file.path: file.sha256 for file in first.files} == {file.path: file.sha256 for file in second.files}


def load_step(config: Config, step: int) -> Any:
    return load_trained(Storage.from_config(config.storage), store_of(config).uri(step), config.run.scratch)


class KillAt:
    """Kills this rank before the nth call of one of the store's methods in the checkpoint of a step, or inside it, before the rename."""

    def __init__(self, rank: int, method: str, part: str, number: int, is_inside: bool = False) -> None:
        self.rank, self.method, self.part, self.number, self.is_inside = rank, method, part, number, is_inside

    def __call__(self) -> None:
        original = getattr(Storage, self.method)
        calls = 0

        def killing(storage: Storage, *arguments: Any) -> Any:
            nonlocal calls
            if any(f"step-{2 * EVERY:08d}" in str(argument) and self.part in str(argument) for argument in arguments):
                calls += 1
                if torch.distributed.get_rank() == self.rank and calls == self.number:
                    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
                    if not self.is_inside:
                        kill()
                    os.fsync = lambda descriptor: kill()
            return original(storage, *arguments)

        setattr(Storage, self.method, killing)


MOMENTS = {
    "before the first byte": KillAt(1, "upload", "files-", 1),
    "inside a file": KillAt(1, "upload", "files-", 1, is_inside=True),
    "between two files": KillAt(0, "upload", "files-", 2),
    "before the list of a part": KillAt(1, "write_bytes", "part-1", 1),
    "all parts but no manifest": KillAt(0, "create", "manifest.json", 1),
    "inside the manifest": KillAt(0, "create", "manifest.json", 1, is_inside=True),
}
QUICK = ("inside a file", "all parts but no manifest")


@pytest.mark.parametrize("moment", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MOMENTS])
def test_a_kill_inside_a_write_leaves_nothing_that_is_read(tmp_path: Path, expected: dict[str, str], moment: str) -> None:
    killed = config_of(tmp_path, "killed")
    run_until_killed(run, 2, killed, MOMENTS[moment])
    assert store_of(killed).steps() == [EVERY]
    published, hashes = run_distributed(run, 2, killed)[0]
    assert min(published) == EVERY + 1
    assert hashes == expected
    storage, folder = Storage.from_config(killed.storage), store_of(killed).uri(2 * EVERY)
    attempt = read_manifest(storage, folder).attempt
    assert all(f"/files-{attempt}/" in found.uri or found.uri.endswith("manifest.json") for found in storage.list(folder))


@pytest.mark.parametrize("damage", ["flip", "empty manifest", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "delete"))])
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    tmp_path: Path, expected: dict[str, str], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = config_of(tmp_path, "stopped", training__max_steps=2 * EVERY + 1)
    config = config_of(tmp_path, "stopped")
    run_distributed(run_part, 2, stopped)
    storage, steps = Storage.from_config(config.storage), store_of(config).steps()
    broken = [break_one(storage, store_of(config).uri(step), damage, step) for step in steps[1:]]
    published, hashes = run_distributed(run, 2, config)[0]
    assert min(published) == EVERY + 1
    assert hashes == expected
    shown = capfd.readouterr().err
    assert all(name in shown for name in broken)


def test_where_all_are_damaged_the_run_stops_and_lists_them(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_distributed(run, 2, config)
    storage, steps = Storage.from_config(config.storage), store_of(config).steps()
    broken = [break_one(storage, store_of(config).uri(step), "flip", step) for step in steps]
    with pytest.raises(RankError) as error:
        run_distributed(run, 2, config.with_values({"training.max_steps": STEPS + 1}))
    assert UserError.__name__ in str(error.value)
    assert all(f"step-{step:08d}: {name} is damaged" in str(error.value) for step, name in zip(steps, broken, strict=True))


def run_part(config: Config) -> None:
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem).run()


def break_one(storage: Storage, uri: str, damage: str, seed: int) -> str:
    """Break one file of a checkpoint, and return its name."""
    if damage == "empty manifest":
        Path(uri, "manifest.json").write_bytes(b"")
        return "manifest.json"
    generator = random.Random(seed)
    manifest = read_manifest(storage, uri)
    name = generator.choice([file.path for file in manifest.files])
    path = Path(uri, f"files-{manifest.attempt}", name)
    whole = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        whole[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(whole) if damage == "flip" else path.read_bytes()[:-1])
    return name
