"""The fairness bound in training: the group that is behind on validation gains weight, and a killed run resumes with its duals."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.objectives.objective import MicroBatch
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fairness")
    make_dataset(Storage(str(path / "store")), num_users=200)
    return path


def config(folder: Path, name: str, **values: object) -> Config:
    base = {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "run.name": name,
        "data.dataset": str(folder / "store/datasets/tiny-200-40-0"),
        "data.max_history": 10,
        "model.width": 16,
        "model.text.mode": "off",
        "training.num_workers": 2,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 8,
        "training.max_steps": 30,
        "checkpoint.every_steps": 5,
    }
    return load_config().with_values(base | {key.replace("__", "."): value for key, value in values.items()})


class Dying(LocalReporter):
    """Interrupts the run at step 17, within an epoch."""

    def step(self, step: int, losses: dict[str, float], batches: Sequence[MicroBatch]) -> None:
        super().step(step, losses, batches)
        if step == 17:
            raise KeyboardInterrupt


def run(config: Config, is_dying: bool = False) -> tuple[TrainingState | None, list[dict[str, float]], list[dict[str, float]]]:
    reporter = Dying() if is_dying else LocalReporter()
    try:
        state = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    except KeyboardInterrupt:
        state = None
    return state, reporter.losses, reporter.history


GROUPS = ("retrieval of group even", "retrieval of group odd")
METRICS = ("ndcg@10 of group even", "ndcg@10 of group odd")


def test_the_group_behind_gains_weight_and_what_is_reported_is_not_weighed(folder: Path) -> None:
    state, losses, history = run_distributed(run, 2, config(folder, "bounded", fairness__attribute="group", fairness__dual_rate=0.5))[0]
    free, free_losses, _ = run_distributed(run, 2, config(folder, "free"))[0]
    assert state is not None
    assert free is not None
    assert free.objective == {}
    assert set(GROUPS).isdisjoint(free_losses[0])
    first = losses[0]
    share = (free_losses[0]["retrieval"] - first[GROUPS[1]]) / (first[GROUPS[0]] - first[GROUPS[1]])
    assert 0 < share < 1  # while all duals are 0, the loss is the mean over both groups
    assert state.step_in_epoch > 0  # the run ends within an epoch, and its last validation raises no dual
    duals = [0.0, 0.0]
    for epoch in history[:-1]:
        assert epoch["ndcg@10"] == pytest.approx(sum(epoch[name] for name in METRICS) / 2, rel=0.1)
        duals = [max(0.0, dual + 0.5 * (1 - epoch[name] / epoch["ndcg@10"])) for dual, name in zip(duals, METRICS, strict=True)]
    assert max(duals) > 0
    assert state.objective["duals"] == pytest.approx(duals)
    assert losses[-1]["retrieval"] != pytest.approx(free_losses[-1]["retrieval"], rel=1e-6)


def test_a_run_that_was_killed_goes_on_with_its_duals(folder: Path) -> None:
    settings = {"fairness__attribute": "group", "fairness__dual_rate": 0.5}
    whole, whole_losses, _ = run_distributed(run, 2, config(folder, "whole", **settings))[0]
    killed = config(folder, "killed", **settings)
    assert run_distributed(run, 2, killed, True)[0][0] is None
    state, losses, _ = run_distributed(run, 2, killed)[0]
    assert state is not None
    assert whole is not None
    assert losses == whole_losses[15:]
    assert state.objective["duals"] == whole.objective["duals"]
