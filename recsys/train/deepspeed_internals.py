"""All private names of DeepSpeed that this project uses, for lack of public ones. A test fails when one of them moves."""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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


class Part(NamedTuple):
    """Elements of a parameter, counted from `first`, that are at `place` of a flat tensor."""

    parameter: Any
    first: int
    place: int
    size: int


def optimizer_parts(optimizer: Any) -> list[tuple[Tensor, list[Part]]]:
    """Return the flat tensors that the optimizer of ZeRO 1 to 3 updates on this rank, and which parts of parameters are in each."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(zip(optimizer.fp32_partitioned_groups_flat, map(_partitioned, optimizer.fp16_groups), strict=True))
    mapped = [[(each, each._hp_mapping) for each in group if each._hp_mapping is not None] for group in optimizer.bit16_groups]
    parts = [
        [Part(each, here.lp_fragment_address.start, here.hp_fragment_address.start, here.lp_fragment_address.numel) for each, here in group]
        for group in mapped
    ]
    return list(zip(optimizer.single_partition_of_fp32_groups, parts, strict=True))


def _partitioned(parameters: Sequence[Any]) -> list[Part]:
    """Return the parts of parameters that this rank has under ZeRO-3, where each takes equal space on every rank."""
    rank, place, parts = dist.get_rank(), 0, []
    for parameter in parameters:
        size = parameter.ds_tensor.ds_numel
        parts.append(Part(parameter, rank * size, place, min(max(parameter.ds_numel - rank * size, 0), size)))
        place += size
    return parts


@torch.no_grad()
def zero_padding(optimizer: Any) -> None:
    """Zero the padding of ZeRO-3's partitions: DeepSpeed leaves it uninitialized, so equal runs would save different bytes."""
    for flat, parts in optimizer_parts(optimizer):
        for parameter, _, place, size in parts:
            parameter.ds_tensor.data.view(-1)[size:] = 0
            flat[place + size : place + parameter.ds_tensor.ds_numel] = 0
