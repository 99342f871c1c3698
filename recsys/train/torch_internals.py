"""All private names of PyTorch that this project uses, for lack of public ones. A test fails when one of them moves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["TorchDispatchMode", "replaced", "storage_id", "tree_leaves", "tree_map_only"]


def storage_id(tensor: torch.Tensor) -> int:
    """Return an id of a tensor's storage, also on the meta device, where there is no address."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a library's object or module for the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
