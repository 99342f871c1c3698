"""A checkpoint engine for DeepSpeed that copies a state to host memory, so that training continues while it is written."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def host_copies() -> Any:
    """Make what DeepSpeed hands its files to, which keeps copies of them in memory."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class HostCopies(CheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.files: dict[str, Any] = {}
            self._buffers: dict[str, list[Tensor]] = {}  # by the file's name, in the order in which it has tensors

        def create(self, info: Any) -> None:
            """Do nothing."""

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Do nothing, since no file is written here."""

        def save(self, state_dict: Any, path: str) -> None:
            name = Path(path).name
            buffers = Buffers(self._buffers.get(name, []))
            self.files[path] = _copied(state_dict, buffers)
            self._buffers[name] = buffers.used

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False  # a copied view has a storage of its own, no larger than it is

    return HostCopies()


class Buffers:
    """Host memory for one file's tensors after another: that of the checkpoint before, which a GPU has pinned already."""

    def __init__(self, before: list[Tensor]) -> None:
        self._before = iter(before)
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self.used: list[Tensor] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Return the tensor's copy, which one of the same memory shares: frozen weights are named twice by ZeRO-2, tied ones anywhere."""
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._copies or not tensor.numel():
            self._copies[place] = self._copy_to_next(tensor)
        return self._copies[place]

    def _copy_to_next(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the next buffer, or to a new one where that is of another kind."""
        buffer = next(self._before, None)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.used.append(buffer.copy_(tensor.detach(), non_blocking=True))
        return buffer


def _copied(state: Any, buffers: Buffers) -> Any:
    """Copy a state's tensors to host memory, and the containers that they are in; all else is shared."""
    if isinstance(state, Tensor):
        return buffers.copy(state)
    if isinstance(state, dict):
        copy = state.copy()  # keeps the class, such as OrderedDict
        copy.update({key: _copied(value, buffers) for key, value in state.items()})
        return copy
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(_copied(value, buffers) for value in state)
    return state
