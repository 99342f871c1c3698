"""Private names of PyTorch and DeepSpeed still exist and have the meaning that the adapters expect."""

import inspect

import torch

from recsys.train.deepspeed_internals import import_deepspeed
from recsys.train.torch_internals import TorchDispatchMode, replaced, storage_id, tree_leaves, tree_map_only


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


def test_containers_are_mapped_and_what_is_a_leaf_may_be_chosen() -> None:
    tree = {"sizes": [torch.Size((2, 3))], "number": 1.5}
    mapped = tree_map_only(int, lambda number: number + 1, tree, is_leaf=lambda part: isinstance(part, torch.Size))
    assert mapped == tree
    assert isinstance(mapped["sizes"][0], torch.Size)
    assert tree_map_only(int, lambda number: number + 1, ({"a": 1}, "b")) == ({"a": 2}, "b")


def test_what_is_replaced_comes_back_after_an_error() -> None:
    before = torch.compile
    try:
        with replaced(torch, "compile", None):
            assert torch.compile is None
            raise KeyError
    except KeyError:
        assert torch.compile is before


def test_deepspeed_still_has_what_is_set_and_read() -> None:
    deepspeed = import_deepspeed(use_gpu=False)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.utils.tensor_fragment import set_full_hp_param, tensor_fragment

    source = inspect.getsource(engine.DeepSpeedEngine)
    assert "self._copy_recovery_script(" in source
    assert "self._config.load_universal_checkpoint" in source
    assert {"fp16_groups", "fp32_partitioned_groups_flat"} <= set(stage3.DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names)
    assert {"bit16_groups", "single_partition_of_fp32_groups"} <= set(stage_1_and_2.DeepSpeedZeroOptimizer.__init__.__code__.co_names)
    assert "_hp_mapping" in set_full_hp_param.__code__.co_names
    assert {"lp_fragment_address", "hp_fragment_address"} <= set(tensor_fragment.__dataclass_fields__)
