"""The same command twice with the same seed: every file of the two checkpoints has the same bytes."""

from pathlib import Path

import pytest

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.loop import Trainer
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


@pytest.mark.parametrize(
    ("zero_stage", "text_mode", "loss", "negatives"),
    [
        (0, "off", "full", "uniform"),
        (2, "frozen", "sampled", "in_batch"),
        pytest.param(2, "lora", "sampled", "popularity", marks=pytest.mark.slow),
        pytest.param(1, "full", "gbce", "uniform", marks=pytest.mark.slow),
    ],
)
def test_two_runs_write_the_same_bytes(tmp_path: Path, zero_stage: int, text_mode: str, loss: str, negatives: str) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    hashes = []
    for number in (1, 2):
        config = small_config(
            dataset,
            tmp_path / str(number),
            run__name=f"run-{number}",
            model__id_dropout=0.1,
            model__text__mode=text_mode,
            model__text__backbone="tiny",
            model__text__max_tokens=16,
            model__loss__kind=loss,
            model__loss__negatives=negatives,
            model__loss__num_negatives=16,
            training__num_workers=2,
            training__zero_stage=zero_stage,
            training__micro_batch_size=4,
            training__max_steps=12,
        )
        hashes.append(run_distributed(run, 2, config)[0])
    assert hashes[0] == hashes[1]
    assert any("optim" in name or "model" in name for name in hashes[0])


def run(config: Config) -> dict[str, str]:
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    state = Trainer(config, dataset, LocalReporter(), NextItem).run()
    newest = CheckpointStore(storage, config, dataset).newest()
    assert newest is not None
    assert newest.state.step == state.step == 12
    return {entry.path: entry.sha256 for entry in newest.files}
