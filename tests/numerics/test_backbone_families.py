"""Language models of every family, frozen, with LoRA and fully fine-tuned: exports give the same scores as the trained model.

All cells: python -m pytest tests/numerics/test_backbone_families.py. The quick suite has each family in one mode and pooling.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.exports.files import load_export, write_export
from recsys.model.text.backbones import check_backbone
from recsys.objectives.next_item import NextItem
from recsys.predictor import Predictor
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from tests.backbones import FAMILIES, save_backbone
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.exports import users_of
from tests.reporters import LocalReporter

MODES = ("frozen", "lora", "full")
POOLINGS = ("mean", "first", "last")
CELLS = [(family, mode, pooling) for family in FAMILIES for mode in MODES for pooling in POOLINGS]
QUICK = {(family, MODES[place % 3], POOLINGS[(place + place // 3) % 3]) for place, family in enumerate(FAMILIES)}


def run(config: Config) -> tuple[str, list[float]]:
    storage = Storage.from_config(config.storage)
    dataset, reporter = Dataset.open(storage, config.data.dataset), LocalReporter()
    state = Trainer(config, dataset, reporter, NextItem).run()
    return CheckpointStore(storage, config, dataset).uri(state.step), [losses["retrieval"] for losses in reporter.losses]


def published(config: Config, checkpoint: str, folder: Path) -> tuple[Predictor, Predictor]:
    """Load a checkpoint as a predictor and export it; return both the predictor and the loaded export."""
    storage = Storage.from_config(config.storage)
    _, trained, dataset, recommender = load_trained(storage, checkpoint, config.run.scratch)
    offline = build_predictor(trained, dataset, recommender)
    folder.mkdir()
    write_export(offline, recommender.state_dict(), dataset, folder, num_golden=4)
    return offline, load_export(folder).predictor


@pytest.mark.parametrize(
    ("family", "mode", "pooling"), [pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow) for cell in CELLS]
)
def test_a_family_trains_and_serves_what_it_scores_offline(tmp_path: Path, family: str, mode: str, pooling: str) -> None:
    backbone = save_backbone(tmp_path / "backbone", family)
    text: dict[str, Any] = {"backbone": backbone, "mode": mode, "pooling": pooling, "max_tokens": 16}
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    values = {"training__max_steps": 2, "model__query_rate": 0.5, **{f"model__text__{key}": value for key, value in text.items()}}
    config = small_config(dataset, tmp_path, **values)
    check_backbone(config.model.text, dataset.storage, tmp_path / "scratch")
    ((checkpoint, losses),) = run_distributed(run, 1, config)
    assert np.isfinite(losses).all()
    offline, served = published(config, checkpoint, tmp_path / "export")
    histories = list(users_of(dataset).values())
    queries = ["a comedy about 7", None, "western"] * (len(histories) // 3)
    torch.testing.assert_close(served.score_catalogue(histories), offline.score_catalogue(histories), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        served.score_catalogue(histories, queries), offline.score_catalogue(histories, queries), rtol=1e-5, atol=1e-5
    )
    asked, silent = (offline.score_catalogue(histories, words)[:, 1:] for words in (queries, None))
    assert not torch.equal(asked, silent)
