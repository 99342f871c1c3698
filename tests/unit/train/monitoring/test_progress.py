"""Monitoring of a run: the progress line, peak FLOPs of a GPU, and the profile's files."""

import gzip
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.monitoring.flops import flops_per_token, peak_flops
from recsys.train.monitoring.progress import Progress, bar
from recsys.train.state import TrainingState
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


def test_a_line_has_speed_waiting_and_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = load_config().with_values({"run.scratch": str(tmp_path), "training.log_every_seconds": 10, "training.epochs": 2})
    progress = Progress(
        config, Storage(str(tmp_path / "store")), total_steps=40, state=TrainingState(), flops_per_token=1e6, peak_flops=1e9
    )
    state = TrainingState(validation={"ndcg@10": 0.25})
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            now[0] += 1.0
            state.record_step({"retrieval": 2.0}, 50, 1.0, 0.1)
            state.checkpoint_stall_seconds += 0.02
            progress.step(state, {"retrieval": 2.0}, 300, 1e-3)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "█████··············· step 10/40 | epoch 1/2 | loss retrieval 2.0000 | ndcg@10 0.2500 | 50 samples/s | 300 tokens/s | "
        "30.0 MFU % | 10.0 data wait % | 2.0 checkpoint stall % | ETA 0:30"
    )
    progress.validation(state, "ndcg@10")
    progress.close()
    (uploaded,) = (found.uri for found in Storage(str(tmp_path / "store")).list(str(tmp_path / "store")))
    events = EventAccumulator(uploaded)
    events.Reload()
    assert {"loss/retrieval", "learning_rate", "validation/ndcg@10", "speed/tokens/s"} <= set(events.Tags()["scalars"])


def test_without_a_language_model_nothing_is_said_of_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config().with_values({"run.scratch": str(tmp_path), "training.log_every_seconds": 0})
    progress, state = Progress(config, Storage(str(tmp_path / "store")), 4, TrainingState()), TrainingState()
    with caplog.at_level(logging.INFO):
        state.record_step({"retrieval": 2.0}, 50, 1.0, 0.1)
        progress.step(state, {"retrieval": 2.0}, 0, 1e-3)
    progress.close()
    (line,) = (record.getMessage() for record in caplog.records)
    assert "tokens" not in line
    assert "MFU" not in line
    assert "ndcg" not in line


def test_a_bar_is_empty_at_first_and_full_at_last() -> None:
    assert [bar(done, 8, width=4) for done in (0, 1, 2, 7, 8)] == ["····", "····", "█···", "███·", "████"]


def test_operations_per_token_are_those_of_the_matrices_and_of_attention() -> None:
    backbone = nn.ModuleDict({"embedding": nn.Embedding(100, 8), "trained": nn.Linear(8, 16), "frozen": nn.Linear(16, 4)})
    backbone["frozen"].weight.requires_grad_(False)
    backbone.config = SimpleNamespace(num_hidden_layers=3, num_attention_heads=2, hidden_size=8)
    assert flops_per_token(backbone) == 6 * 8 * 16 + 4 * 16 * 4
    assert flops_per_token(backbone, 10.0) == 6 * 8 * 16 + 4 * 16 * 4 + 12 * 3 * 8 * 10


def test_a_gpu_is_known_by_a_part_of_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("something else") == 0


def test_a_profile_has_a_trace_and_a_table_of_the_steps_parts(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    batch = {"training__global_batch_size": 8, "training__micro_batch_size": 4}
    config = small_config(dataset, tmp_path, run__name="profiled", training__max_steps=10, training__profile_steps=3, **batch)
    run_distributed(train_profiled, 1, config)
    folder = Path(dataset.storage.uri("runs", "profiled", "profile"))
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert (names.count("forward"), names.count("backward"), names.count("update")) == (6, 6, 6)  # three steps of two micro batches
    assert {"forward", "backward", "update"} <= set((folder / "table.txt").read_text().split())


def train_profiled(config: Config) -> None:
    torch.set_num_threads(1)
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem).run()
