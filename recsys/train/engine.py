"""The DeepSpeed adapter: the sharded engine, its step, its state on disk, conversion for other numbers of ranks, and whole weights."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from recsys.config import Config
from recsys.objectives.objective import MicroBatch
from recsys.train.deepspeed_internals import (
    import_deepspeed,
    loading_universal,
    optimizer_parts,
    write_no_recovery_script,
    zero_padding,
)
from recsys.train.host_copies import host_copies
from recsys.train.torch_internals import replaced

TAG = "state"
_NOWHERE = "nowhere"
"""The folder passed to DeepSpeed's save; no file is written there."""

BUCKET_ELEMENTS = 500_000_000
"""Maximum gradients that DeepSpeed reduces at once. It allocates a buffer of the configured size (this is 2 GB) for any model."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of each parameter."""

SHARED_FILE = "mp_rank_00_model_states.pt"
"""The only file that rank 0 writes and every rank reads."""

SHARDED_SUFFIX = "_optim_states.pt"
"""Suffix of the files with each rank's part of the optimizer's state; without ZeRO there are none."""


class Engine:
    """A model under ZeRO. Every rank must call every method."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        deepspeed = import_deepspeed(config.training.use_gpu)
        groups = parameter_groups(model, config)
        self._peaks = [float(group["lr"]) for group in groups]
        self._device, self._copies = device, host_copies()
        # All other DeepSpeed optimizers skip the update if a gradient is not finite.
        self._updates_blindly = config.training.zero_stage == 0 and config.training.precision == "fp32"
        self._scale = dist.get_world_size() * config.training.accumulation_steps(dist.get_world_size())
        num_trained = sum(tensor.numel() for group in groups for tensor in group["params"])
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device),
            optimizer=_optimizer(groups, config),
            config=deepspeed_config(config, dist.get_world_size(), num_trained),
            dist_init_required=False,
        )
        self.train()  # a loaded language model is in evaluation mode
        write_no_recovery_script(self._engine)
        if config.training.zero_stage == 3:
            zero_padding(self._optimizer)

    @property
    def module(self) -> Any:
        """The trained module; under ZeRO-3 its parameters are whole only during a forward."""
        return self._engine.module

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    @record_function("forward")
    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the sum of each loss over the batch, by name."""
        losses: dict[str, Tensor] = self._engine(batch)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's share of the step's loss, already divided by global counts.

        DeepSpeed averages over ranks and micro batches, but the loss is a sum over them, so the average is undone.
        """
        with record_function("backward"):
            self._engine.backward(loss * self._scale)
        if not self._engine.is_gradient_accumulation_boundary():
            self.update()  # DeepSpeed counts the micro batch here

    @record_function("update")
    def update(self) -> bool:
        """Update the weights after a step's last backward pass, unless a gradient is NaN or infinite; return whether they changed."""
        if self._updates_blindly and self._engine.is_gradient_accumulation_boundary():
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            if not nn.utils.get_total_norm(gradients).isfinite():
                return False
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def set_learning_rate(self, factor: float) -> None:
        """Set each parameter group's learning rate to its peak times `factor`."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def snapshot(self) -> dict[str, Any]:
        """Copy this rank's part of the state to host memory, so that training can continue; return its files by path.

        The next call reuses the memory: the previous copy must be written by then.
        """
        self._copies.files = {}
        with replaced(self._engine, "checkpoint_engine", self._copies):
            self._engine.save_checkpoint(_NOWHERE, tag=TAG, save_latest=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies to pinned memory are asynchronous
        return {Path(path).relative_to(_NOWHERE).as_posix(): state for path, state in self._copies.files.items()}

    def load(self, folder: Path, is_universal: bool = False) -> None:
        """Load the state of all ranks from `folder`; unless it is universal, the same number of ranks must have saved it."""
        groups = self._optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with loading_universal(self._engine, is_universal):
            self._engine.load_checkpoint(str(folder), tag=TAG)
        for group, values in zip(groups, own, strict=True):  # ZeRO-3 gives all groups the first one's, for a universal state
            group.update(values)
        for moments in self._optimizer.optimizer.state.values() if is_universal else ():
            if isinstance(moments.get("step"), Tensor):  # parameters share one tensor, which each would increment
                moments["step"] = moments["step"].clone()

    def load_moments(self, moment: Callable[[str, str], Tensor], step: float) -> None:
        """Set Adam's state before the first step: `moment` returns a parameter's whole moment, by name and kind. Needs ZeRO 1 to 3."""
        adam = self._optimizer.optimizer
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for flat, parts in optimizer_parts(self._optimizer):
            is_torch = isinstance(adam, torch.optim.AdamW)
            adam.state[flat]["step"] = torch.tensor(step, device=flat.device) if is_torch else int(step)
            for key in MOMENTS:
                adam.state[flat][key] = torch.zeros_like(flat)
                for part in parts:
                    values = moment(names[id(part.parameter)], key).flatten()[part.first : part.first + part.size]
                    adam.state[flat][key][part.place : part.place + part.size] = values


def deepspeed_config(config: Config, world_size: int, num_trained: int) -> dict[str, Any]:
    """Return DeepSpeed's config for a model with `num_trained` trained parameters."""
    training = config.training
    zero: dict[str, Any] = {"stage": training.zero_stage, "reduce_bucket_size": min(num_trained, BUCKET_ELEMENTS)}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.use_gpu}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.use_gpu}
    num_micro_batches = training.accumulation_steps(world_size)
    return {
        "train_micro_batch_size_per_gpu": math.ceil(training.global_batch_size / (world_size * num_micro_batches)),
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"tag_validation": "Ignore"},  # the tag is constant; validating it takes two collectives
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


def learning_rate_factor(config: Config, step: int, total_steps: int) -> float:
    """Return the learning rate of a step (from 0) divided by its peak: linear warm-up, then cosine decay to `final_fraction`."""
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    return optimizer.final_fraction + (1 - optimizer.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    if config.training.offload_optimizer:
        adam: torch.optim.Optimizer = import_deepspeed(config.training.use_gpu).ops.adam.DeepSpeedCPUAdam(groups, betas=betas)
        return adam
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def consolidate(folder: Path, use_gpu: bool = False) -> dict[str, Tensor]:
    """Return whole float32 weights from the saved state of all ranks, in one process on the CPU.

    The files are pickles: call this only on files whose hashes match the checkpoint's manifest. `use_gpu` says whether this process uses
    DeepSpeed on a GPU later; its first import decides that.
    """
    model_file = folder / TAG / SHARED_FILE
    if not list((folder / TAG).glob(f"*{SHARDED_SUFFIX}")):
        weights: dict[str, Tensor] = torch.load(model_file, map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in weights.items()}
    import_deepspeed(use_gpu)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG))


def convert_to_universal(folder: Path, target: Path) -> None:
    """Convert the state saved by all ranks in `folder` to a universal state in `target`, which any number of ranks can load.

    Call it in one process. The files are pickles, as for `consolidate`.

    Raises:
        RuntimeError: the conversion failed, or its result differs from the input.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += [f"--input_folder={folder / TAG}", f"--output_folder={target / TAG}"]
    command += ["--num_extract_workers=1", "--num_merge_workers=1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the state in {folder} could not be converted: {finished.stderr[-2000:]}")
    whole = consolidate(folder)
    shapes = torch.load(next((folder / TAG).glob("*_model_states.pt")), map_location="cpu", weights_only=False)["param_shapes"]
    for name in (name for group in shapes for name in group):
        weights, *moments = (_universal_part(target / TAG / "zero" / name / f"{key}.pt") for key in ("fp32", *MOMENTS))
        if not torch.equal(weights, whole[name].flatten()) or any(moment.shape != weights.shape for moment in moments):
            raise RuntimeError(f"the state in {folder} could not be converted: {name} changed")


def read_moments(folder: Path, target: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Return Adam's moments of the state saved by all ranks, by kind and parameter, and its number of steps; `target` is overwritten.

    ZeRO 0 saves the moments without names. `weights` are those of `consolidate`.
    """
    convert_to_universal(folder, target)
    parts = target / TAG / "zero"
    names = [name for name in weights if (parts / name / f"{MOMENTS[0]}.pt").is_file()]
    moments = {key: {name: _universal_part(parts / name / f"{key}.pt").view(weights[name].shape) for name in names} for key in MOMENTS}
    shard = torch.load(next((folder / TAG).glob(f"*{SHARDED_SUFFIX}")), map_location="cpu", weights_only=False)["optimizer_state_dict"]
    adam = shard.get("base_optimizer_state") or shard["optimizer_state_dict"]  # ZeRO 1 and 2, or 3
    return moments, float(adam["state"][0]["step"])


def _universal_part(path: Path) -> Tensor:
    """Return a parameter's flat tensor of a universal state; ZeRO-3 saves the tensor itself, the other stages a dict."""
    part = torch.load(path, map_location="cpu", weights_only=False)
    tensor: Tensor = part["param"] if isinstance(part, dict) else part
    return tensor.flatten()
