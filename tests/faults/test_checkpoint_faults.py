"""Checkpoints with a flipped bit, full disks and too little memory: each is detected, named, and survived."""

import contextlib
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.manifest import DamagedCheckpointError, fetch_files, read_manifest
from recsys.train.loop import Trainer
from tests.checkpoints import store_of
from tests.datasets import make_dataset, small_config
from tests.distributed import RankError, run_distributed
from tests.reporters import LocalReporter

STEPS = 6
NUM_FLIPS = 200


def make_config(folder: Path, **values: object) -> Config:
    base = {"training__max_steps": STEPS, "checkpoint__every_steps": 2}
    return small_config(make_dataset(Storage(str(folder / "store"))), folder, **base | values)


def run(config: Config) -> dict[str, str]:
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem).run()
    newest = store_of(config).newest()
    assert newest is not None
    return {file.path: file.sha256 for file in newest.files}


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run_distributed(run, 1, config)
    storage, uri = Storage.from_config(config.storage), store_of(config).uri(STEPS)
    manifest = read_manifest(storage, uri)
    paths = [Path(uri, "manifest.json"), *(Path(uri, f"files-{manifest.attempt}", file.path) for file in manifest.files)]
    generator, num_found = random.Random(0), 0
    for _ in range(NUM_FLIPS):
        path = generator.choice(paths)
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(broken))
        try:
            fetch_files(storage, uri, read_manifest(storage, uri), tmp_path / "fetched")
        except DamagedCheckpointError as error:
            num_found += f"{path.name} is damaged" in str(error)
        path.write_bytes(whole)
    assert num_found == NUM_FLIPS
    fetch_files(storage, uri, read_manifest(storage, uri), tmp_path / "fetched")


def test_a_manifest_of_another_run_or_step_is_passed_over(tmp_path: Path) -> None:
    one, other = make_config(tmp_path, run__name="one"), make_config(tmp_path, run__name="other")
    run_distributed(run, 1, one)
    run_distributed(run, 1, other)
    manifests = {config.run.name: Path(store_of(config).uri(STEPS), "manifest.json") for config in (one, other)}
    manifests["one"].write_bytes(manifests["other"].read_bytes())
    newest = store_of(one).newest()
    assert newest is not None
    assert (newest.run, newest.state.step) == ("one", STEPS - 2)
    run_distributed(run, 1, one)
    assert read_manifest(Storage.from_config(one.storage), store_of(one).uri(STEPS)).run == "one"


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("place", ["scratch/checkpoints", pytest.param("store/runs", marks=pytest.mark.slow)])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path: Path, place: str) -> None:
    expected = run_distributed(run, 1, make_config(tmp_path / "whole"))[0]
    folder = tmp_path / "full"
    config = make_config(folder)
    with small_disk(folder / place, 64 << 10):
        with pytest.raises(RankError, match=r"ENOSPC \(No space left on device\); free disk space"):
            run_distributed(run, 1, config)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder / place)], check=True)
        assert run_distributed(run, 1, config)[0] == expected


def run_short_of_memory(config: Config) -> None:
    trainer = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem)
    backward = trainer.engine.backward

    def starved(loss: object) -> None:
        if trainer.state.step == 3:
            trainer.checkpoints.wait()  # that of step 2 is not what shall run short
            room = psutil.Process().memory_info().vms + (1 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
        backward(loss)  # type: ignore[arg-type]

    trainer.engine.backward = starved  # type: ignore[method-assign]
    trainer.run()


def test_a_batch_that_does_not_fit_is_named_with_its_shapes(tmp_path: Path) -> None:
    config = make_config(tmp_path, model__width=1024, model__num_heads=2)
    says = (
        r"out of memory on rank 0 at step 3: micro batch of .*targets \(\d+,\).* does not fit .*training\.micro_batch_size=\d+ needs 50% of"
    )
    with pytest.raises(RankError, match=says):
        run_distributed(run_short_of_memory, 1, config)
    assert store_of(config).steps() == [2]


def test_where_the_room_is_missing_it_is_a_mistake_that_a_person_can_mend(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10), pytest.raises(UserError, match="free disk space"):
        Storage(str(tmp_path / "disk")).write_bytes(str(tmp_path / "disk" / "file"), bytes(1 << 20))
