"""Killed workers and drivers: the run recovers by itself or by the same command again, and equals an uninterrupted run."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.data.manifest import Dataset
from recsys.store import Storage
from tests.conftest import kill_descendants
from tests.datasets import make_dataset
from tests.resume.ledger import order_kills
from tests.resume.runs import EVERY, Run, assert_same, steps_per_epoch, workers_of

UPLOAD_STEPS = EVERY
"""Maximum number of steps during the upload of a checkpoint; then the next checkpoint waits for it."""

pytestmark = pytest.mark.ray
seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
"""Seeds of the draws of when a fault occurs and on which rank."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("killed") / "store")), num_users=300)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_descendants("tests.resume.ledger")


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(dataset, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    result = run.finish()
    assert result["incidents"] == []
    yield run
    kill_descendants("tests.resume.ledger")


def test_a_run_whose_workers_are_killed_at_random_steps_ends_by_itself(dataset: Dataset, undisturbed: Run, tmp_path: Path) -> None:
    per_epoch = steps_per_epoch(dataset)
    kills = [
        (generator.randrange(2), per_epoch * seed + generator.randrange(1, per_epoch))
        for seed in range(3)
        if (generator := random.Random(seed))
    ]
    kills.append((0, 3 * per_epoch))  # right after an epoch was reported
    run = Run(dataset, tmp_path, "killed")
    order_kills(run.scratch, kills)
    result = run.finish()
    assert_same(run, undisturbed)
    assert [incident["causes"][-1]["kind"] for incident in result["incidents"]] == ["worker_lost"] * len(kills)
    assert [incident["step"] for incident in result["incidents"]] == run.resumed_steps()
    for (_, step), resumed in zip(kills, run.resumed_steps(), strict=True):
        assert 0 <= step - resumed <= EVERY + UPLOAD_STEPS, (step, resumed)
    assert run.resumed_steps()[-1] == 3 * per_epoch
    assert 0 < result["goodput"] < 1
    assert all(incident["seconds"] > incident["start_seconds"] + incident["load_seconds"] > 0 for incident in result["incidents"])


@seeds
def test_a_killed_run_goes_on_when_it_is_submitted_again(dataset: Dataset, undisturbed: Run, tmp_path: Path, seed: int) -> None:
    name, above = f"submitted-again-{seed}", random.Random(seed).randrange(EVERY, 3 * steps_per_epoch(dataset))
    run = Run(dataset, tmp_path, name)
    run.set_pace(0.05)
    process = run.start()
    run.wait_for_checkpoint(process, above_step=above)
    for victim in (*workers_of(process), process):
        victim.send_signal(signal.SIGKILL)
    process.wait()
    run.set_pace(0)
    result = run.finish()
    assert_same(run, undisturbed)
    assert run.resumed_steps()[0] >= above
    assert [incident["causes"][0]["kind"] for incident in result["incidents"]] == ["driver_lost"]
    assert run.finish()["checkpoint"] == result["checkpoint"]
    assert len(run.resumed_steps()) == 1
    folders = {
        found.uri.removeprefix(dataset.storage.uri("runs")).split("/")[1] for found in dataset.storage.list(dataset.storage.uri("runs"))
    }
    assert not [folder for folder in folders if folder.startswith(name) and folder != name]


@seeds
def test_a_worker_that_stands_still_is_found_and_the_run_goes_on(dataset: Dataset, undisturbed: Run, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    run = Run(dataset, tmp_path, f"stopped-worker-{seed}", training__hang_seconds=5)
    run.set_pace(0.02)
    process = run.start()
    run.wait_for_checkpoint(process, above_step=generator.randrange(2 * steps_per_epoch(dataset)))
    workers_of(process)[generator.randrange(2)].send_signal(signal.SIGSTOP)
    result = run.finish(process)
    assert_same(run, undisturbed)
    assert [incident["causes"][-1]["kind"] for incident in result["incidents"]] == ["hang"]


@seeds
def test_a_run_that_is_told_to_end_saves_its_last_step_and_repeats_none(
    dataset: Dataset, undisturbed: Run, tmp_path: Path, seed: int
) -> None:
    run = Run(dataset, tmp_path, f"stopped-{seed}", checkpoint__every_steps=10_000)
    run.set_pace(0.05)  # so that there is an epoch to be stopped in
    process = run.start()
    run.wait_for_checkpoint(process, above_step=0)
    time.sleep(random.Random(seed).uniform(0, 2))
    process.terminate()
    process.communicate(timeout=100)
    assert process.returncode == 2
    assert f"run {run.name} was asked to stop; the same command continues from step" in run.log.read_text()
    result = run.finish()
    assert_same(run, undisturbed)
    assert result["incidents"] == []
    assert set(run.ledger()[1].values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
def test_what_follows_from_a_loss_that_is_no_number(dataset: Dataset, undisturbed: Run, tmp_path: Path, policy: str) -> None:
    run, bad = Run(dataset, tmp_path, f"poisoned-{policy}", training__on_non_finite=policy), EVERY + 5
    (run.scratch / f"poison-{bad}").touch()
    process = run.start()
    if policy == "skip":
        result = run.finish(process)
        assert result["skipped_steps"] == [bad]
        assert [cause["kind"] for incident in result["incidents"] for cause in incident["causes"]] == ["not_finite"]
        assert run.ledger()[0] == undisturbed.ledger()[0]
    else:
        process.communicate(timeout=300)
        assert process.returncode == 2
        assert f"step {bad}: loss retrieval" in run.log.read_text().splitlines()[-1]
        assert run.ledger()[1][bad] == {"roll_back": 2, "stop": 1}[policy]


@pytest.mark.slow
def test_a_run_that_is_submitted_twice_is_trained_by_the_first(dataset: Dataset, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "twice", training__epochs=60, training__early_stopping_patience=60)
    run.set_pace(0.05)
    first = run.start()
    run.wait_for_checkpoint(first, above_step=1)
    second = run.start()
    _, _ = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"run.name = twice: is trained by process {first.pid} on" in run.log.read_text()
    assert first.poll() is None
    first.kill()


@pytest.mark.parametrize(
    ("resume", "error"), [("must", "has no checkpoint"), pytest.param("never", "has checkpoints", marks=pytest.mark.slow)]
)
def test_whether_to_go_on_may_be_said(dataset: Dataset, undisturbed: Run, tmp_path: Path, resume: str, error: str) -> None:
    name = "absent" if resume == "must" else "undisturbed"
    run = Run(dataset, tmp_path, name, run__resume=resume)
    process = run.start()
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"run.resume = {resume}: run {name} {error}" in run.log.read_text()
