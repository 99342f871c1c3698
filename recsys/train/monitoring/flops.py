"""FLOPs of the language model per token, and the peak of known GPUs."""

from typing import Any

import torch
from torch import nn

from recsys.model.text.encoder import TextEncoder

DENSE_BF16_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}
"""Dense bf16 operations per second by part of a GPU's name, from the vendor's data sheets; the first match counts."""


def flops_of(module: nn.Module, num_gpus: int) -> tuple[float, float]:
    """Return `flops_per_token` of a module's language model, and the peak of `num_gpus` GPUs like this process's; 0 if there are none."""
    encoder = next((part for part in module.modules() if isinstance(part, TextEncoder)), None)
    per_token = 0.0 if encoder is None else flops_per_token(encoder.backbone)
    return per_token, peak_flops(torch.cuda.get_device_name()) * num_gpus if num_gpus else 0.0


def peak_flops(device_name: str) -> float:
    """Return a GPU's peak operations per second in bf16; 0 if unknown."""
    return next((flops for name, flops in DENSE_BF16_FLOPS.items() if name in device_name), 0.0)


def flops_per_token(backbone: Any, mean_tokens: float = 0.0) -> float:
    """Return the operations of a forward and backward pass per token, for texts of `mean_tokens`; 0 leaves out attention.

    6 per trained weight and 4 per frozen weight, without embeddings, plus 12 x layers x width x tokens for attention (Chowdhery et al.
    2022, appendix B), which is counted in full for decoders too, as is usual.
    """
    config = backbone.config
    embeddings = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    matrices = [weight for weight in backbone.parameters() if weight.ndim >= 2 and id(weight) not in embeddings]
    dense = sum((6 if weight.requires_grad else 4) * getattr(weight, "ds_numel", weight.numel()) for weight in matrices)
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return float(dense + 12 * config.num_hidden_layers * heads * mean_tokens)
