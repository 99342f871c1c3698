"""Cached text embeddings of items outside the micro batch: gradients, refreshes shared by ranks, and resuming after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from recsys.config import Config
from recsys.data.batch import Collator
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.model.recommender import RETRIEVAL, Recommender, build_recommender
from recsys.model.text.catalogue_text import Ranks
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.checkpoints import store_of
from tests.datasets import make_dataset, open_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

EVERY = 3


def config_of(folder: Path, **values: object) -> Config:
    base = {
        "model__text__mode": "lora",
        "model__text__backbone": "tiny",
        "model__text__max_tokens": 16,
        "model__text__refresh_steps": EVERY,
        "training__num_workers": 2,
        "training__micro_batch_size": 4,
        "optimizer__backbone_learning_rate": 0.01,
        "optimizer__warmup_steps": 0,
        "optimizer__final_fraction": 1.0,
    }
    return small_config(make_dataset(Storage(str(folder / "store"))), folder, **base | values)


def test_the_language_model_learns_from_the_items_of_the_micro_batch_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    dataset = open_dataset(config)
    model = build_recommender(config, dataset, torch.device("cpu")).double().eval()
    rows = Sequences.from_table(dataset.read_shard(dataset.manifest.train_shards[0]).slice(0, 3), sample_id=np.arange(3))
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    kept, whole = (Collator(dataset.manifest, takes_whole_catalogue=True, caches_texts=keeps)(rows, *nothing) for keeps in (True, False))
    occurring = set(rows.columns["items"][np.concatenate([np.arange(s, s + n) for s, n in zip(rows.starts, rows.lengths, strict=True)])])
    assert occurring <= set(kept.items_on_host.tolist()) <= occurring | {0}
    assert len(kept.items_on_host) < len(whole.items_on_host)

    model.item_encoder.refresh_texts(0, 1)
    assert bool(model.item_encoder.kept_text[1:].any(1).all())
    found = gradients_of(model, kept)
    of_others = gradients_of(model, whole)
    encode = model.item_encoder._text

    def stopped(items: torch.Tensor | None, on_host: torch.Tensor | None = None) -> torch.Tensor:
        vectors, learns = encode(items, on_host), torch.zeros(dataset.manifest.num_items + 1, 1, dtype=torch.bool)
        learns[kept.items_on_host] = True
        return torch.where(learns, vectors, vectors.detach())

    model.item_encoder._text = stopped  # type: ignore[method-assign]
    expected = gradients_of(model, whole)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9, msg=name)
    assert any(not torch.allclose(of_others[name], expected[name], rtol=1e-3) for name in expected if "backbone" in name)


def gradients_of(model: Recommender, batch: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = model(batch)
    losses[RETRIEVAL].backward()
    return {"loss": losses[RETRIEVAL].detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def refreshed(config: Config) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cached embeddings after a refresh by all ranks, and those that one rank computes alone."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.barrier)
    encoder = build_recommender(config, open_dataset(config), torch.device("cpu"), ranks).item_encoder
    encoder.refresh_texts(ranks.rank, ranks.world_size)
    with torch.no_grad():
        return encoder.kept_text.numpy(), encoder.eval()._text(None).numpy()


def test_the_ranks_share_a_refresh(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config.model.caches_texts
    for kept, expected in run_distributed(refreshed, 3, config):
        np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)


def trained(config: Config) -> tuple[list[int], dict[str, str]]:
    """Train; return the steps at which this rank refreshed, and the hashes of the last checkpoint's files."""
    trainer = Trainer(config, open_dataset(config), LocalReporter(), NextItem)
    assert isinstance(trainer.objective, NextItem)
    encoder, steps = trainer.objective.module.item_encoder, []
    refresh = encoder.refresh_texts

    def noted(rank: int, world_size: int) -> None:
        steps.append(trainer.state.step)
        refresh(rank, world_size)

    encoder.refresh_texts = noted  # type: ignore[method-assign]
    trainer.run()
    newest = store_of(config).newest()
    assert newest is not None
    return steps, {file.path: file.sha256 for file in newest.files}


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_a_run_that_went_on_between_two_refreshes_is_the_undisturbed_one(tmp_path: Path, stage: int) -> None:
    config = config_of(tmp_path, training__zero_stage=stage, training__max_steps=8, checkpoint__every_steps=4)
    whole, expected = run_distributed(trained, 2, config.with_values({"run.name": "whole"}))[0]
    assert whole == [0, 3, 6]
    parts = config.with_values({"run.name": "parts"})
    assert run_distributed(trained, 2, parts.with_values({"training.max_steps": 4}))[0][0] == [0, 3]
    then, found = run_distributed(trained, 2, parts)[0]
    assert then == [6]
    assert found == expected


def test_other_ranks_that_go_on_refresh_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, training__num_workers=(1, 2), training__max_steps=4)
    run_distributed(trained, 2, config)
    steps, _ = run_distributed(trained, 1, config.with_values({"training.max_steps": 8}))[0]
    assert steps[0] in (4, 6)
    assert steps[-1] == 6


def test_what_has_no_use_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.text\.refresh_steps = 3 needs model\.text\.mode = lora or full, and model\.loss\.kind = full"
    ):
        config_of(tmp_path, model__loss__kind="sampled")
