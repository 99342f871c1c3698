"""Faults inside training: a non-finite loss, and checkpoints that are damaged or of another run."""

import random
from collections.abc import Callable
from pathlib import Path

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
from recsys.train.failures import Attempt
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.datasets import make_dataset, open_dataset, small_config
from tests.distributed import RankError, run_distributed
from tests.reporters import LocalReporter

Poison = Callable[[torch.Tensor], torch.Tensor]


def make_config(folder: Path, **values: object) -> Config:
    storage = Storage(str(folder / "store"))
    return small_config(Dataset.open(storage, storage.uri("datasets", "tiny-60-40-0")), folder, **{"training__epochs": 2} | values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_dataset(Storage(str(folder / "store")))
    run_distributed(run, 1, make_config(folder))
    return folder


def run(config: Config) -> int:
    return Trainer(config, open_dataset(config), LocalReporter(), NextItem).run().step


def without_gradient(loss: torch.Tensor) -> torch.Tensor:
    """Return a loss of the same value with a NaN gradient."""
    return loss + (0 * loss).sqrt()


def run_poisoned(config: Config, skip: tuple[int, ...] = (), poison: Poison = lambda loss: loss * float("nan")) -> TrainingState:
    """Make the loss at step 2 on rank 1 non-finite, and check that no weight changed."""
    trainer = Trainer(config, open_dataset(config), LocalReporter(), NextItem, attempt=Attempt(skip=skip))
    healthy_forward = trainer.engine.forward

    def forward(batch: object) -> dict[str, torch.Tensor]:
        losses = healthy_forward(batch)  # type: ignore[arg-type]
        is_poisoned = trainer.state.step == 2 and trainer.rank == 1
        return {name: poison(loss) if is_poisoned else loss for name, loss in losses.items()}

    trainer.engine.forward = forward  # type: ignore[method-assign]
    try:
        return trainer.run()
    finally:
        assert all(bool(parameter.isfinite().all()) for parameter in trainer.engine.module.parameters())


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(tmp_path: Path) -> None:
    make_dataset(Storage(str(tmp_path / "store")))
    values = {"training__num_workers": 2, "training__micro_batch_size": 8, "checkpoint__every_steps": 1}
    with pytest.raises(RankError, match=r"step 2: loss .*retrieval.* is not finite; rank \d had samples \["):
        run_distributed(run_poisoned, 2, make_config(tmp_path, **values))
    checkpoints = CheckpointStore(Storage(str(tmp_path / "store")), make_config(tmp_path, **values), open_dataset(make_config(tmp_path)))
    assert checkpoints.steps()[-1] == 2


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (0, "fp32"),
        (2, "fp32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"))),
    ],
)
def test_a_gradient_that_is_no_number_stops_the_run_too(tmp_path: Path, zero_stage: int, precision: str) -> None:
    make_dataset(Storage(str(tmp_path / "store")))
    values = {"training__num_workers": 2, "training__micro_batch_size": 4, "checkpoint__every_steps": 1}
    config = make_config(tmp_path, **values, training__zero_stage=zero_stage, training__precision=precision)
    says = r"not finite on rank \d at step 2: step 2: a gradient is not finite, though the loss is; rank 0 had samples \["
    with pytest.raises(RankError, match=says):
        run_distributed(run_poisoned, 2, config, (), without_gradient)
    assert CheckpointStore(Storage.from_config(config.storage), config, open_dataset(config)).steps()[-1] == 2


def test_a_step_that_is_to_be_skipped_changes_nothing_but_the_place_in_the_data(tmp_path: Path) -> None:
    make_dataset(Storage(str(tmp_path / "store")))
    values = {"training__num_workers": 2, "training__micro_batch_size": 8, "training__max_steps": 3, "checkpoint__every_steps": 1}
    config = make_config(tmp_path, **values)
    state = run_distributed(run_poisoned, 2, config, (2,))[0]
    assert (state.step, state.samples_seen, state.skipped_steps) == (3, 48, [2])
    storage = Storage.from_config(config.storage)
    checkpoints = CheckpointStore(storage, config, open_dataset(config))
    before, after = (load_trained(storage, checkpoints.uri(step), config.run.scratch)[3].state_dict() for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_named_before_it_is_read(trained: Path, damage: str) -> None:
    config = make_config(trained)
    storage = Storage.from_config(config.storage)
    checkpoints = CheckpointStore(storage, config, open_dataset(config))
    uri = checkpoints.uri(checkpoints.steps()[-1])
    manifest = read_manifest(storage, uri)
    files = [Path(uri, f"files-{manifest.attempt}", file.path) for file in manifest.files]
    generator = random.Random(damage)
    for path in files:
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(bytes(broken) if damage == "flip" else whole[:-1])
        with pytest.raises(UserError, match=rf"{path.name} is (missing|damaged)"):
            load_trained(storage, uri, config.run.scratch)
        path.write_bytes(whole)
    assert load_trained(storage, uri, config.run.scratch)


def test_a_folder_without_a_manifest_is_no_checkpoint(trained: Path) -> None:
    config = make_config(trained)
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_trained(Storage.from_config(config.storage), str(trained / "store/runs/default/checkpoints/step-99999999"), config.run.scratch)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__width": 32}, "model.width: 16 -> 32"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate: 0.001 -> 0.5"),
    ],
)
def test_another_config_under_the_same_name_is_refused_by_key(trained: Path, values: dict[str, object], message: str) -> None:
    config = make_config(trained, **values)
    checkpoints = CheckpointStore(Storage.from_config(config.storage), config, open_dataset(config))
    newest = checkpoints.newest()
    assert newest is not None
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        checkpoints.check_compatible(newest)


def test_a_finished_run_has_nothing_left_to_do(trained: Path) -> None:
    before = sorted(path for path in (trained / "store/runs").rglob("*"))
    steps = run_distributed(run, 1, make_config(trained))[0]
    assert steps == run_distributed(run, 1, make_config(trained))[0]
    assert [path for path in sorted((trained / "store/runs").rglob("*")) if "tensorboard" not in str(path)] == [
        path for path in before if "tensorboard" not in str(path)
    ]
