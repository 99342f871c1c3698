"""The private names of PyTorch and DeepSpeed are still where the adapters find them, and mean what they take them for."""

import inspect

import torch

from recsys.train.deepspeed_internals import import_deepspeed
from recsys.train.torch_internals import TorchDispatchMode, storage_id, tree_leaves


def test_a_storage_id_tells_memory_apart_also_without_addresses() -> None:
    whole = torch.empty(4, device="meta")
    assert storage_id(whole) == storage_id(whole[1:])
    assert storage_id(whole) != storage_id(torch.empty(4, device="meta"))


def test_a_dispatch_mode_sees_operators_and_leaves_are_flat() -> None:
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert any("add" in name for name in seen)
    assert tree_leaves(([1, {"a": 2}], {"b": (3,)})) == [1, 2, 3]


def test_deepspeed_still_has_what_is_set_and_read() -> None:
    deepspeed = import_deepspeed(use_gpu=False)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import stage3

    source = inspect.getsource(engine.DeepSpeedEngine)
    assert "self._copy_recovery_script(" in source
    assert "self._config.load_universal_checkpoint" in source
    assert {"fp16_groups", "fp32_partitioned_groups_flat"} <= set(stage3.DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names)
