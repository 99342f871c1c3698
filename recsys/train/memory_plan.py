"""Predicts a worker's memory by part, without running a step."""

import dataclasses
import logging
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from recsys.config.training import TrainingConfig
from recsys.errors import UserError
from recsys.objectives.objective import MicroBatch, tensors_of
from recsys.train.engine import BUCKET_ELEMENTS
from recsys.train.torch_internals import TorchDispatchMode, replaced, storage_id, tree_leaves

logger = logging.getLogger(__name__)
_GATHERED = 1_000_000_000
"""Maximum number of weights that ZeRO-3 keeps gathered at once."""

META = torch.device("meta")


@dataclass(frozen=True)
class ModelSize:
    """The numbers of trained and frozen weights of a model, and the bytes of its buffers, for example a catalogue's features."""

    trained: int
    frozen: int
    buffer_bytes: int

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Return the size of a module."""
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in module.parameters()) - trained
        return cls(trained, frozen, sum(buffer.nbytes for buffer in module.buffers()))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one worker's device by part: `parts` are always held; each of `phases` of a step adds its own in turn."""

    parts: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    micro_batch_size: int

    @property
    def peak_bytes(self) -> int:
        """The maximum held at once."""
        return sum(self.parts.values()) + max(sum(phase.values()) for phase in self.phases.values())

    def table(self) -> str:
        """Return one line per part, in MiB."""
        rows = [("", name, size) for name, size in self.parts.items()]
        rows += [(f"{phase}: ", name, size) for phase, parts in self.phases.items() for name, size in parts.items()]
        rows.append(("", "at once, at most", self.peak_bytes))
        return "\n".join(f"{phase + name:<40}{size / 2**20:>12,.1f} MiB" for phase, name, size in rows if size)

    def fitting_micro_batch(self, capacity_bytes: int) -> int | None:
        """Return the largest smaller micro batch that divides this one and fits, or None; activations are proportional to it."""
        activations = self.phases["computing"]["activations"]
        for size in range(self.micro_batch_size - 1, 0, -1):
            computing = {**self.phases["computing"], "activations": math.ceil(activations * size / self.micro_batch_size)}
            smaller = dataclasses.replace(self, phases={**self.phases, "computing": computing})
            if self.micro_batch_size % size == 0 and smaller.peak_bytes <= capacity_bytes:
                return size
        return None

    def check(self, capacity_bytes: int, where: str) -> None:
        """Raise a UserError if the plan does not fit, with the largest parts and a micro batch that would fit, if any."""
        if self.peak_bytes <= capacity_bytes:
            return
        fitting = self.fitting_micro_batch(capacity_bytes)
        largest = sorted([*self.parts.items(), *self.phases["computing"].items()], key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in largest)
        way = "raise training.zero_stage or training.num_workers" if fitting is None else f"training.micro_batch_size={fitting} would fit"
        raise UserError(
            f"training.micro_batch_size = {self.micro_batch_size}: a worker would need {self.peak_bytes / 2**30:.2f} GiB of the "
            f"{capacity_bytes / 2**30:.2f} GiB of {where} ({named} GiB); {way}"
        )


def plan_memory(size: ModelSize, training: TrainingConfig, world_size: int, activation_bytes: int) -> MemoryPlan:
    """Return the predicted memory of one of `world_size` workers; `activation_bytes` covers both passes of a micro batch."""
    stage, element = training.zero_stage, 2 if training.precision == "bf16" else 4
    share = world_size if stage else 1
    size_bytes, trained = (size.trained + size.frozen) * element, size.trained * element
    has_master = stage > 0 or training.precision == "bf16"
    kept = trained // world_size if stage >= 2 else trained
    bucket = min(size.trained, BUCKET_ELEMENTS) * element
    gathered = min(size.trained + size.frozen, _GATHERED) * element if stage == 3 else 0
    is_apart = training.use_gpu  # offloading saves device memory only if the host's memory is separate
    parts = {
        "weights": 0 if training.offload_parameters and is_apart else size_bytes // (world_size if stage == 3 else 1),
        "optimizer": 0 if training.offload_optimizer and is_apart else (12 if has_master else 8) * size.trained // share,
        "buffers": size.buffer_bytes if is_apart else 0,  # on a CPU they are files shared by all processes of the machine
        "bucket of gradients": bucket if stage == 3 else 0,
    }
    saved = parts["weights"] if stage < 3 else size.frozen * element // world_size  # on rank 0, which saves most
    parts["checkpoint's copy"] = 0 if is_apart else saved + (12 if has_master else 8) * size.trained // share
    computing = {
        "gathered weights": gathered,
        "gradients": kept if stage >= 2 or training.accumulation_steps(world_size) > 1 else 0,
        "bucket of gradients": bucket if stage in (1, 2) else 0,
        "activations": activation_bytes,
    }
    # ZeRO-3 concatenates the gradients to send twice; gloo copies them once more.
    sent = (2 if training.use_gpu else 3) * bucket if stage == 3 else bucket if stage == 0 else 0
    reducing = {"gathered weights": gathered, "gradients": kept, "gradients sent": sent}
    copies = 4 * size.trained // share if training.precision == "bf16" else 0
    updating = {"gradients": kept, "gradients in float32": copies}
    return MemoryPlan(parts, {"computing": computing, "reducing": reducing, "updating": updating}, training.micro_batch_size)


def plan_step(module: nn.Module, batches: Sequence[MicroBatch], training: TrainingConfig, world_size: int) -> MemoryPlan:
    """Return the predicted memory of this worker, from the largest micro batch of one of its steps. Sets training mode."""
    module.train()
    try:
        largest = max(batches, key=lambda batch: sum(tensor.numel() for _, tensor in tensors_of(batch)))
        activation_bytes = _trace_activations(module, largest, training, len(batches) > 1)
    except (NotImplementedError, RuntimeError) as error:
        logger.warning("memory: the size of this model's activations cannot be predicted (%s)", " ".join(str(error).split())[:200])
        activation_bytes = 0
    return plan_memory(ModelSize.of(module), training, world_size, activation_bytes)


def _trace_activations(module: nn.Module, batch: MicroBatch, training: TrainingConfig, accumulates: bool) -> int:
    """Return the peak bytes of a micro batch's forward and backward pass, besides weights and earlier gradients.

    Nothing is computed: the passes run on meta tensors. A gradient that ZeRO releases immediately counts until then.
    """
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    state = {name: _without_content(parameter, dtype) for name, parameter in module.named_parameters()}
    state |= {name: _without_content(buffer, buffer.dtype) for name, buffer in module.named_buffers()}
    for tensor in state.values():
        if training.zero_stage in (1, 2, 3) and tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_drop_gradient)
        elif tensor.requires_grad and accumulates:
            tensor.grad = torch.empty_like(tensor)
    empty = batch.to(META)
    with _Allocations() as allocations, _fused_attention(training.use_gpu), _Undecided(), torch.random.fork_rng([]):
        torch.func.functional_call(_Pass(module), {f"module.{name}": tensor for name, tensor in state.items()}, (empty,))
    return allocations.peak_bytes


class _Pass(nn.Module):
    """Both passes as one forward, so that recomputation in the backward pass uses the same weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: MicroBatch) -> None:
        torch.stack([total.float() for total in self.module(batch).values()]).sum().backward()


class _Allocations(TorchDispatchMode):
    """Counts the bytes of live meta tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self._bytes = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        inputs = {storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and storage_id(tensor) not in inputs | self._counted:
                storage = tensor.untyped_storage()
                self._counted.add(storage_id(tensor))
                self._bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._bytes)
                weakref.finalize(storage, self._release, storage_id(tensor), storage.nbytes())
        return result

    def _release(self, storage: int, num_bytes: int) -> None:
        self._counted.remove(storage)
        self._bytes -= num_bytes


class _Fused(torch.autograd.Function):
    """Fused attention: saves its inputs, its output and one number per row, never the full scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused_attention(use_gpu: bool) -> AbstractContextManager[None]:
    """Make attention allocate the same memory as its fused kernel; on a CPU only without dropout.

    The function is replaced, because PyTorch's function modes are not active when the backward pass recomputes a layer.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Any:
        if use_gpu or not options.get("dropout_p"):
            return _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
        return plain(query, key, value, *arguments, **options)

    return replaced(F, "scaled_dot_product_attention", attention)


class _Undecided(TorchFunctionMode):
    """Returns False when a model reads the value of a meta tensor, for example to check whether nothing is masked."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and args[0].device.type == "meta":
            return False
        return func(*args, **(kwargs or {}))


def _without_content(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=META, requires_grad=tensor.requires_grad)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def capacity(module: nn.Module, use_gpu: bool, world_size: int) -> tuple[int, str]:
    """Return the bytes that this rank can hold, including weights that it holds already, and a description of this memory."""
    free, where = device_bytes(use_gpu, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    return free + (0 if use_gpu else sum(parameter.nbytes for parameter in module.parameters())), where


def device_bytes(use_gpu: bool, local_workers: int) -> tuple[int, str]:
    """Return the bytes of memory per worker of a machine, and a description; on a CPU, workers share the memory that is free now."""
    if use_gpu:
        return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    return free_host_bytes() // local_workers, f"free memory for each of {local_workers} workers on this machine"


def free_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the free bytes of the machine, or of its container if those are fewer; file caches count as free."""
    free = _numbers(meminfo)["MemAvailable:"] << 10
    limit = (cgroup / "memory.max").read_text().strip() if (cgroup / "memory.max").exists() else "max"
    if limit == "max":
        return free
    cached = sum(size for name, size in _numbers(cgroup / "memory.stat").items() if name in ("active_file", "inactive_file"))
    return min(free, int(limit) - int((cgroup / "memory.current").read_text()) + cached)


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines}
