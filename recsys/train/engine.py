"""The one door to DeepSpeed: building the sharded engine, one step of it, its state on disk, and weights out of that state."""

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.config import Config
from recsys.train.trainable import MicroBatch

TAG = "state"
_FULL_BYTES = 16 << 20
SHARED_FILE = "mp_rank_00_model_states.pt"
"""The one file that rank 0 writes and every rank reads."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a state in host memory: what is to be written, by the file's path in the checkpoint."""

    files: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the files below `folder`.

        Raises:
            OSError: the disk is full.
        """
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save(content, folder / name)
            except RuntimeError as error:  # torch says only that its writer failed
                if shutil.disk_usage(folder).free > _FULL_BYTES:
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


class Engine:
    """A model under ZeRO. Every rank must call every method."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        deepspeed = _import_deepspeed(config.training.use_gpu)
        # The shared-memory kernel serves inference only, and compiling it takes half a minute at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        groups = parameter_groups(model, config)
        self._peaks = [float(group["lr"]) for group in groups]
        self._scale = dist.get_world_size() * config.training.accumulation_steps
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device),
            optimizer=_optimizer(groups, config),
            config=deepspeed_config(config, dist.get_world_size()),
            dist_init_required=False,
        )
        if config.training.zero_stage == 3:
            _zero_padding(self._optimizer)

    @property
    def module(self) -> Any:
        """The trained module; under ZeRO-3 its parameters are whole only inside a forward."""
        return self._engine.module

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the batch's loss sums by name."""
        losses: dict[str, Tensor] = self._engine(batch)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's share of the step's loss, already divided by global counts.

        DeepSpeed averages over ranks and micro batches; the loss is a sum over them, so that is undone here.
        """
        self._engine.backward(loss * self._scale)

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro batch ended; the step's last one updates the weights."""
        self._engine.step()

    def set_learning_rate(self, factor: float) -> None:
        """Set each parameter group's rate to its peak times `factor`."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def snapshot(self) -> Snapshot:
        """Copy this rank's part of the state, so that training can go on while it is written."""
        copies, writer = _host_copies(), self._engine.checkpoint_engine
        self._engine.checkpoint_engine = copies
        try:
            with tempfile.TemporaryDirectory() as folder:  # DeepSpeed puts a script of its own there
                (Path(folder) / TAG).mkdir()
                self._engine.save_checkpoint(folder, tag=TAG, save_latest=False)
                return Snapshot({Path(path).relative_to(folder).as_posix(): state for path, state in copies.files.items()})
        finally:
            self._engine.checkpoint_engine = writer

    def load(self, folder: Path) -> None:
        """Load the state of all ranks from `folder`; the number of ranks must be the one that saved it."""
        self._engine.load_checkpoint(str(folder), tag=TAG)


@torch.no_grad()
def _zero_padding(optimizer: Any) -> None:
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


def _host_copies() -> Any:
    """Make what DeepSpeed hands its files to, which keeps copies of them in memory."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class HostCopies(CheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.files: dict[str, Any] = {}

        def create(self, info: Any) -> None:
            """Do nothing."""

        def save(self, state_dict: Any, path: str) -> None:
            self.files[path] = _copied(state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False  # a copied view has a storage of its own, no larger than it is

    return HostCopies()


def _copied(state: Any) -> Any:
    """Copy a state's tensors to host memory, and the containers that they are in; all else is shared."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copy = state.copy()  # keeps the class, such as OrderedDict
        copy.update({key: _copied(value) for key, value in state.items()})
        return copy
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(_copied(value) for value in state)
    return state


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Derive DeepSpeed's own config."""
    training = config.training
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.use_gpu}
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.global_batch_size // (world_size * training.accumulation_steps),
        "gradient_accumulation_steps": training.accumulation_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate (language model or not) and weight decay (matrices only)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("text_encoder." in name, parameter.ndim >= 2), []).append(parameter)
    optimizer = config.optimizer
    return [
        {
            "params": parameters,
            "lr": optimizer.backbone_learning_rate if is_backbone else optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay if is_matrix else 0.0,
        }
        for (is_backbone, is_matrix), parameters in groups.items()
    ]


def _optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    if config.training.offload_optimizer:
        adam: torch.optim.Optimizer = _import_deepspeed(config.training.use_gpu).ops.adam.DeepSpeedCPUAdam(groups, betas=betas)
        return adam
    return torch.optim.AdamW(groups, betas=betas)


def consolidate(folder: Path) -> dict[str, Tensor]:
    """Join the state that `Engine.save` wrote on all ranks into whole float32 weights, in one process on the CPU.

    The files are pickles: only call this on files whose hashes the checkpoint's manifest confirmed.
    """
    model_file = folder / TAG / SHARED_FILE
    if not list((folder / TAG).glob("*_optim_states.pt")):
        weights: dict[str, Tensor] = torch.load(model_file, map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in weights.items()}
    _import_deepspeed(use_gpu=False)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG))


def _import_deepspeed(use_gpu: bool) -> Any:
    """Import DeepSpeed for the device that is asked for; by itself it takes a GPU wherever there is one."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    import deepspeed

    return deepspeed
