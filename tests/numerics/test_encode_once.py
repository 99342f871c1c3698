"""Encoding each distinct item of a micro batch once gives the losses and gradients of encoding every position."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import load_config
from recsys.data.batch import Collator
from recsys.data.sequences import Sequences
from recsys.model.recommender import build_recommender
from recsys.store import Storage
from tests.benchmarks.item_encoding import encode_every_position
from tests.datasets import make_dataset


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradients_are_those_of_encoding_every_position(tmp_path: Path, mode: str) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    values = ["model.width=16", "data.max_history=10", f"model.text.mode={mode}", "model.text.backbone=tiny", "model.text.max_tokens=16"]
    config = load_config(None, [*values, "model.loss.kind=sampled", f"run.scratch={tmp_path / 'scratch'}"])
    model = build_recommender(config, dataset, torch.device("cpu")).double().eval()  # eval mode, since dropout is drawn per encoded text
    table = dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 12)
    negatives = torch.tensor([3, 9, 9, 40]), torch.full((4,), 1 / 40).log()
    once = Collator(dataset.manifest, takes_whole_catalogue=False)(Sequences.from_table(table, sample_id=np.arange(12)), *negatives)
    every = encode_every_position(once)
    assert len(every.items) > 2 * len(once.items)
    results = []
    for batch in (once, every):
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (expected_losses, expected) = results
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert any("backbone" in name for name in gradients)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8, msg=name)
