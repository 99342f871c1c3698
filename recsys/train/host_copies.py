"""Copies a training state to host memory, through a checkpoint engine of DeepSpeed, so that training continues while it is written."""

import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.train.torch_internals import tree_map_only

_FULL_BYTES = 16 << 20
"""A disk with less free space counts as full."""


class Buffers:
    """Host memory for the tensors of one file, in order. The next copy reuses it, so memory is pinned only once."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def copied(self, state: Any) -> Any:
        """Return a copy of a state's tensors and their containers; tensors with the same memory share a copy, other objects are shared."""
        before, self._tensors = iter(self._tensors), []
        copies: dict[tuple[Any, ...], Tensor] = {}  # ZeRO-2 lists frozen weights twice, and tied weights may be anywhere

        def copy(tensor: Tensor) -> Tensor:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies or not tensor.numel():
                buffer = next(before, None)
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[place] = buffer.copy_(tensor.detach(), non_blocking=True)
                self._tensors.append(buffer)
            return copies[place]

        return tree_map_only(Tensor, copy, state, is_leaf=lambda part: isinstance(part, torch.Size))  # it would become a tuple


def host_copies() -> Any:
    """Build a checkpoint engine for DeepSpeed that keeps copies of its files in `files`, by path."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class HostCopies(CheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.files: dict[str, Any] = {}
            self._buffers: dict[str, Buffers] = defaultdict(Buffers)  # by the file's name

        def create(self, info: Any) -> None: ...

        def makedirs(self, path: str, exist_ok: bool = False) -> None: ...  # no file is written

        def save(self, state_dict: Any, path: str) -> None:
            self.files[path] = self._buffers[Path(path).name].copied(state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False  # a copied view has its own storage of the same size

    return HostCopies()


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Write copied files to their paths below `folder`; raise an OSError if the disk is full."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(content, folder / name)
        except RuntimeError as error:  # torch only reports that its writer failed
            if shutil.disk_usage(folder).free > _FULL_BYTES:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
