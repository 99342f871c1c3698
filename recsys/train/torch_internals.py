"""Every private name of PyTorch that this project uses; PyTorch has no public one for it. A test fails when one of them moves."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "storage_id", "tree_leaves"]


def storage_id(tensor: torch.Tensor) -> int:
    """Return what identifies a tensor's memory, also on the meta device, where there is no address."""
    return int(tensor.untyped_storage()._cdata)
