"""Recomputed activations: bit-identical losses and gradients, including dropout, with less memory for the backward pass."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recsys.config import Config, load_config
from recsys.data.batch import Batch
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.model.recommender import Recommender, build_recommender
from recsys.model.user_encoder import recompute_activations
from recsys.store import Storage
from tests.datasets import make_dataset


def config_of(folder: Path, attention: str) -> Config:
    values = {
        "run.scratch": str(folder / "scratch"),
        "data.max_history": 10,
        "model.width": 32,
        "model.num_layers": 4,
        "model.attention": attention,
        "model.text.mode": "full",
        "model.text.backbone": "tiny",
        "training.num_workers": 1,
    }
    return load_config().with_values(values)


def step(model: Recommender, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor], int]:
    """Return losses, gradients, and the bytes that the forward pass saves for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    sum(losses.values(), torch.zeros(())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients, sum(kept.values())


@pytest.mark.parametrize("attention", ["softmax", "hstu"])
def test_the_gradients_are_the_same_and_less_is_kept(tmp_path: Path, attention: str) -> None:
    dataset: Dataset = make_dataset(Storage(str(tmp_path / "store")))
    config = config_of(tmp_path, attention)
    keeping, computing = (build_recommender(config, dataset, torch.device("cpu")) for _ in range(2))
    recompute_activations(computing)
    batch = next(iter(Reader(dataset, keeping.catalogue, config, Share(0, 1, 1)).steps(0)))[0]
    losses, gradients, kept_bytes = step(keeping, batch)
    other_losses, other_gradients, other_bytes = step(computing, batch)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert other_losses == losses
    assert other_gradients.keys() == gradients.keys()
    assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
    assert other_bytes < 0.6 * kept_bytes, (other_bytes, kept_bytes)
