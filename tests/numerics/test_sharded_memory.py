"""Tensors that ZeRO-3 keeps on each worker: only its share of weights, gradients and optimizer state."""

import gc
from pathlib import Path

import pytest
import torch

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


def config_of(folder: Path, num_workers: int) -> Config:
    return small_config(
        make_dataset(Storage(str(folder / "store"))),
        folder,
        run__name=f"workers-{num_workers}",
        model__text__mode="full",
        model__text__backbone="minilm",
        model__text__max_tokens=8,
        training__num_workers=num_workers,
        training__zero_stage=3,
        training__micro_batch_size=4,
        training__max_steps=2,
    )


def bytes_after_training(config: Config) -> tuple[int, int, int]:
    """Return bytes of weights and optimizer on this worker, of all its large tensors, and of the whole model in float32."""
    trainer = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem)
    trainer.run()
    gc.collect()
    optimizer, parameters = trainer.engine._optimizer, list(trainer.engine.module.parameters())
    moments = [value for state in optimizer.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    own = [*moments, *optimizer.fp32_partitioned_groups_flat, *(parameter.ds_tensor for parameter in parameters)]
    alive = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    large = [size for size in (storages(alive) | storages(own)).values() if size > 1 << 20]
    return sum(storages(own).values()), sum(large), 4 * sum(parameter.ds_numel for parameter in parameters)


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each distinct storage of the tensors, by address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.slow
def test_weights_and_optimizer_shrink_with_more_workers(tmp_path: Path) -> None:
    own, alive = {}, {}
    for num_workers in (2, 4):
        found = run_distributed(bytes_after_training, num_workers, config_of(tmp_path, num_workers))
        model_bytes = found[0][2]
        own[num_workers], alive[num_workers] = max(each[0] for each in found), max(each[1] for each in found)
        assert own[num_workers] == pytest.approx(4 * model_bytes / num_workers, rel=0.1)  # weights, their copy, two moments
        assert alive[num_workers] < 6 * model_bytes / num_workers + 2 * model_bytes  # plus gradients and communication buffers
    assert own[2] / own[4] == pytest.approx(2, rel=0.1)
