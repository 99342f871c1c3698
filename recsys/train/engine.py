"""The one door to DeepSpeed: building the sharded engine, one step of it, its state on disk, and weights out of that state."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.config import Config
from recsys.train.trainable import MicroBatch

TAG = "state"


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

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state below `folder`, which no other rank writes to."""
        (folder / TAG).mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Load the state of all ranks from `folder`; the number of ranks must be the one that saved it."""
        self._engine.load_checkpoint(str(folder), tag=TAG)


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
    model_file = folder / TAG / "mp_rank_00_model_states.pt"
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
