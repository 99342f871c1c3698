"""A worker's planned memory compared with the peak of its tensors in real steps under DeepSpeed, measured by PyTorch's allocator."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import jobs.plan_memory as plan_memory_verb
from recsys.config import Config, load_config
from recsys.config.training import TrainingConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.memory_plan import ModelSize, free_host_bytes, plan_memory
from tests.benchmarks.gpu_training import TINY, make_decoder
from tests.datasets import make_dataset, small_settings
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ids alone, one worker": {"model.text.mode": "off", "model.width": 512, "training.num_workers": 1, "training.zero_stage": 0},
    "LoRA, ZeRO-2": {"model.text.mode": "lora", "training.zero_stage": 2, "model.text.max_tokens": 64},
    "all weights, ZeRO-2, bf16": {"model.text.mode": "full", "training.zero_stage": 2, "training.precision": "bf16"},
    "all weights, ZeRO-3": {"model.text.mode": "full", "training.zero_stage": 3},
    "all weights, ZeRO-1, activations computed again": {
        "model.text.mode": "full",
        "training.zero_stage": 1,
        "training.recompute_activations": True,
        "training.micro_batch_size": 16,
    },
}


def config_of(folder: Path, values: dict[str, Any]) -> Config:
    base = {
        "model.width": 64,
        "model.text.backbone": "minilm",
        "model.text.max_tokens": 16,
        "training.num_workers": 2,
        "training.global_batch_size": 32,
        "training.micro_batch_size": 8,
        "training.max_steps": 2,
    }
    settings = small_settings(make_dataset(Storage(str(folder / "store"))), folder)
    return load_config().with_values(settings | base | values)


def planned_and_measured(config: Config) -> tuple[int, int]:
    """Return the planned peak and the measured peak of bytes of live tensors in two steps, for this rank."""
    trainer = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem)
    assert trainer.memory_plan is not None
    gc.collect()
    held = bytes_of([tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for number, batches in enumerate(trainer.objective.steps(0)):
            trainer._step(batches)
            gc.collect()  # free DeepSpeed's reference cycles now rather than at some later time
            if number == 1:
                break
            trainer.engine.snapshot()
    most = total = held
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in memory_events(profiler)):
        total += size
        most = max(most, total)
    return trainer.memory_plan.peak_bytes, most


def memory_events(profiler: Any) -> list[Any]:
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == "cpu"}
    return sum(held.values())


@pytest.mark.parametrize(
    "name", [name if number < 2 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(CONFIGURATIONS)]
)
def test_the_plan_is_within_a_tenth_of_what_training_takes(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, CONFIGURATIONS[name])
    planned, measured = max(run_distributed(planned_and_measured, config.training.max_workers, config), key=lambda found: found[1])
    print(f"{name}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_decoder_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_decoder(tmp_path / "decoder", TINY)
    values = {"model.text.mode": "full", "model.text.backbone": str(tmp_path / "decoder"), "model.text.pooling": "last"}
    plan = plan_memory_verb.run(config_of(tmp_path, {**values, "training.num_workers": 1}))
    assert plan["computing"]["activations"] > 1 << 20
    assert "cannot be predicted" not in caplog.text


def test_shares_shrink_with_more_workers() -> None:
    size = ModelSize(trained=1000, frozen=0, buffer_bytes=0)
    for stage, shared in ((1, ["optimizer"]), (2, ["optimizer"]), (3, ["optimizer", "weights", "checkpoint's copy"])):
        training = TrainingConfig(zero_stage=stage, global_batch_size=64, micro_batch_size=8)
        two, four = (plan_memory(size, training, workers, 0).parts for workers in (2, 4))
        assert [name for name in two if two[name] == 2 * four[name] > 0] == sorted(shared, key=list(two).index)


def test_what_is_offloaded_leaves_the_gpu() -> None:
    size = ModelSize(trained=1000, frozen=0, buffer_bytes=0)
    training = TrainingConfig(zero_stage=3, use_gpu=True, offload_optimizer=True, offload_parameters=True)
    parts = plan_memory(size, training, 2, 0).parts
    assert {name: bytes for name, bytes in parts.items() if bytes} == {"bucket of gradients": 4000}


def test_a_refusal_names_parts_and_what_would_fit() -> None:
    size = ModelSize(trained=1 << 20, frozen=0, buffer_bytes=0)
    plan = plan_memory(size, TrainingConfig(zero_stage=0, global_batch_size=128, micro_batch_size=64), 2, 64 << 20)
    assert plan.peak_bytes == (4 + 8 + 12 + 64) << 20
    plan.check(plan.peak_bytes, "a GPU")
    with pytest.raises(
        UserError, match=r"micro_batch_size = 64: .* of a GPU \(activations 0.06, .*\); training.micro_batch_size=32 would fit"
    ):
        plan.check(plan.peak_bytes - 1, "a GPU")
    assert plan.fitting_micro_batch((24 + 8) << 20) == 8
    with pytest.raises(UserError, match=r"raise training.zero_stage or training.num_workers"):
        plan.check(24 << 20, "a GPU")


def test_a_container_may_have_less_than_the_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert free_host_bytes(tmp_path / "meminfo", tmp_path) == 4000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes(tmp_path / "meminfo", tmp_path) == 4000 << 10
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\nactive_file 200000\ninactive_file 100000\n")
    assert free_host_bytes(tmp_path / "meminfo", tmp_path) == 1_300_000


def refused(config: Config) -> str:
    """Return the error that ends a run on a machine with too little memory, and check that no step was made."""
    import recsys.train.memory_plan

    recsys.train.memory_plan.device_bytes = lambda use_gpu, local_workers: (1 << 20, "a small machine")
    reporter = LocalReporter()
    with pytest.raises(UserError) as refusal:
        Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    assert not reporter.losses
    return str(refusal.value)


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"model.text.mode": "off", "model.width": 512})
    for line in run_distributed(refused, 2, config):
        assert line.startswith("training.micro_batch_size = 8: a worker would need 0.")
        assert "of a small machine (" in line


def test_the_verb_tells_the_plan_of_as_many_workers_as_are_asked_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"model.text.mode": "off", "training.num_workers": 2, "training.zero_stage": 3})
    two, four = (plan_memory_verb.run(config.with_values({"training.num_workers": number})) for number in (2, 4))
    assert two["parts"]["weights"] == 2 * four["parts"]["weights"]
    assert (two["num_workers"], four["num_workers"]) == (2, 4)
    assert two["peak_bytes"] == sum(two["parts"].values()) + max(
        sum(two[phase].values()) for phase in ("computing", "reducing", "updating")
    )
