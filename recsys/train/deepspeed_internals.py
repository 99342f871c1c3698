"""Every private name of DeepSpeed that this project uses; DeepSpeed has no public one for it. A test fails when one of them moves."""

import os
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from recsys.train.torch_internals import replaced


def import_deepspeed(use_gpu: bool) -> Any:
    """Import DeepSpeed for the device that is asked for; by itself it takes a GPU wherever there is one."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    is_loaded = "mlflow" in sys.modules
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    try:
        import deepspeed  # its autotuner, which is not used here, would import MLflow, which takes seconds of every worker's start
    finally:
        if not is_loaded:
            del sys.modules["mlflow"]
    with replaced(torch, "compile", lambda function: function):  # all stages import Muon, which is not used here and loads a compiler
        import deepspeed.runtime.zero.muon.muon_optimizer
    # The shared-memory kernel serves inference only, and compiling it takes half a minute at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def write_no_recovery_script(engine: Any) -> None:
    """Keep an engine from copying a script beside each state, which is not used here."""
    engine._copy_recovery_script = lambda folder: None


def loading_universal(engine: Any, is_universal: bool) -> AbstractContextManager[None]:
    """Have the engine expect a universal state, or not, in the block."""
    return replaced(engine._config, "load_universal_checkpoint", is_universal)


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
