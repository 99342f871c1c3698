"""Copies of a training state in host memory, so that training continues while they are written; what DeepSpeed hands its files to."""

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
"""A disk with less room is taken for full."""


class Buffers:
    """Host memory for one file's tensors, in their order, which the next copy uses again: a GPU has pinned it already."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def copied(self, state: Any) -> Any:
        """Copy a state's tensors, those of the same memory once, and the containers that they are in; all else is shared."""
        before, self._tensors = iter(self._tensors), []
        copies: dict[tuple[Any, ...], Tensor] = {}  # ZeRO-2 names frozen weights twice, and tied ones may be anywhere

        def copy(tensor: Tensor) -> Tensor:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies or not tensor.numel():
                buffer = next(before, None)
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[place] = buffer.copy_(tensor.detach(), non_blocking=True)
                self._tensors.append(buffer)
            return copies[place]

        return tree_map_only(Tensor, copy, state, is_leaf=lambda part: isinstance(part, torch.Size))  # or it would become a tuple


def host_copies() -> Any:
    """Make a checkpoint engine for DeepSpeed that keeps copies of its files in `files`, by their paths."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class HostCopies(CheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.files: dict[str, Any] = {}
            self._buffers: dict[str, Buffers] = defaultdict(Buffers)  # by the file's name

        def create(self, info: Any) -> None: ...

        def makedirs(self, path: str, exist_ok: bool = False) -> None: ...  # since no file is written

        def save(self, state_dict: Any, path: str) -> None:
            self.files[path] = self._buffers[Path(path).name].copied(state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False  # a copied view has a storage of its own, no larger than it is

    return HostCopies()


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Write copied files, by their paths below `folder`; an OSError where the disk is full."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(content, folder / name)
        except RuntimeError as error:  # torch says only that its writer failed
            if shutil.disk_usage(folder).free > _FULL_BYTES:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
