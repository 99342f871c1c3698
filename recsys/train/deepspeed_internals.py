"""All private names of DeepSpeed that this project uses, for lack of public ones. A test fails when one of them moves."""

import os
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from recsys.train.torch_internals import replaced


def import_deepspeed(use_gpu: bool) -> Any:
    """Import DeepSpeed for a GPU or the CPU; by default it uses a GPU if there is one."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    is_loaded = "mlflow" in sys.modules
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    try:
        import deepspeed  # its autotuner (unused) would import MLflow, which adds seconds to every worker's start
    finally:
        if not is_loaded:
            del sys.modules["mlflow"]
    with replaced(torch, "compile", lambda function: function):  # all stages import Muon (unused), which loads a compiler
        import deepspeed.runtime.zero.muon.muon_optimizer
    # The shared-memory kernel is only for inference, and compiling it takes half a minute at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def write_no_recovery_script(engine: Any) -> None:
    """Stop an engine from copying its recovery script (unused) next to each state."""
    engine._copy_recovery_script = lambda folder: None


def loading_universal(engine: Any, is_universal: bool) -> AbstractContextManager[None]:
    """Set whether the engine expects a universal state in the block."""
    return replaced(engine._config, "load_universal_checkpoint", is_universal)


@torch.no_grad()
def zero_padding(optimizer: Any) -> None:
    """Zero the padding of ZeRO-3's partitions: DeepSpeed leaves it uninitialized, so equal runs would save different bytes."""
    rank = dist.get_rank()
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            own = min(max(parameter.ds_numel - rank * size, 0), size)
            parameter.ds_tensor.data.view(-1)[own:] = 0
            flat[begin + own : begin + size] = 0
            begin += size
