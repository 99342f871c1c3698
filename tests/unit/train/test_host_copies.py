"""Copies of a state in host memory: what is copied, what is shared, and that memory is reused."""

from collections import OrderedDict

import torch

from recsys.train.host_copies import Buffers


def test_a_copy_has_the_same_containers_and_does_not_change_with_the_state() -> None:
    weight = torch.ones(2, 3)
    shapes = OrderedDict(weight=torch.Size((2, 3)))
    state = {"module": OrderedDict(weight=weight, tied=weight), "groups": [({"lr": 0.1}, None)], "shapes": [shapes]}
    copy = Buffers().copied(state)
    weight.zero_()
    assert torch.equal(copy["module"]["weight"], torch.ones(2, 3))
    assert copy["module"]["tied"] is copy["module"]["weight"]
    assert isinstance(copy["module"], OrderedDict)
    assert copy["groups"] == [({"lr": 0.1}, None)]
    assert isinstance(copy["shapes"][0]["weight"], torch.Size)


def test_the_next_copy_uses_the_memory_of_the_one_before() -> None:
    buffers, weight, other = Buffers(), torch.ones(2, 3), torch.zeros(4)
    first = buffers.copied({"weight": weight, "other": other})
    second = buffers.copied({"weight": weight + 1, "other": torch.zeros(5)})
    assert second["weight"] is first["weight"]
    assert torch.equal(second["weight"], torch.full((2, 3), 2.0))
    assert second["other"].shape == (5,)


def test_empty_tensors_share_nothing() -> None:
    copy = Buffers().copied([torch.empty(0), torch.empty(0)])
    assert copy[0] is not copy[1]
