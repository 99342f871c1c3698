"""Every private name of DeepSpeed that this project uses; DeepSpeed has no public one for it. A test fails when one of them moves."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def import_deepspeed(use_gpu: bool) -> Any:
    """Import DeepSpeed for the device that is asked for; by itself it takes a GPU wherever there is one."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    with _not_imported("mlflow"):  # its autotuner, which is not used here, would
        import deepspeed
    with _nothing_compiled():  # all stages import Muon, which is not used here and loads a compiler
        import deepspeed.runtime.zero.muon.muon_optimizer
    # The shared-memory kernel serves inference only, and compiling it takes half a minute at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Leave functions that are made in the block as they are, where they ask to be compiled."""
    compile_function, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


@contextmanager
def _not_imported(module: str) -> Iterator[None]:
    """Have the block do without a module that is optional there and takes seconds of every worker's start."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def write_no_recovery_script(engine: Any) -> None:
    """Keep an engine from copying a script beside each state, which is not used here."""
    engine._copy_recovery_script = lambda folder: None


@contextmanager
def loading_universal(engine: Any, is_universal: bool) -> Iterator[None]:
    """Have the engine expect a universal state, or not, in the block."""
    engine._config.load_universal_checkpoint = is_universal
    yield
    engine._config.load_universal_checkpoint = False


@torch.no_grad()
def zero_padding(optimizer: Any) -> None:
    """Fill what pads ZeRO-3's partitions: DeepSpeed leaves it as it was in memory, so that two equal runs would save unlike bytes."""
    rank = dist.get_rank()
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            own = min(max(parameter.ds_numel - rank * size, 0), size)
            parameter.ds_tensor.data.view(-1)[own:] = 0
            flat[begin + own : begin + size] = 0
            begin += size
