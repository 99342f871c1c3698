import numpy as np
import torch
import torch.nn.functional as F

from recsys.data.batch import PackedProfiles
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace
from recsys.model.situations import ContextFusion, ProfileEncoder

WIDTH = 6


def test_a_profile_is_the_mean_of_its_categories_plus_the_projected_numbers() -> None:
    space = ProfileSpace(numbers=("a", "b"), moments=((0, 1), (0, 1)), categories=("c",), vocabulary=("c=", "c=x", "c=y"))
    encoder = ProfileEncoder(space, WIDTH)
    numbers = torch.tensor([[0.5, float("nan")], [float("nan"), float("nan")]])
    found = encoder(PackedProfiles(torch.tensor([2, 3, 1, 9]), torch.tensor([0, 2]), numbers), 2)
    table, projection = encoder.categories.weight, encoder.numbers
    assert projection is not None
    read = torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.0] * 4])
    expected = torch.stack([(table[2] + table[3]) / 2, table[1]])  # 9 is of a later version: unknown, and not counted
    torch.testing.assert_close(found, expected + read @ projection.weight.T + projection.bias)


def test_a_context_is_joined_by_the_plain_formula_and_begins_without_effect() -> None:
    space = ContextSpace.of(("weekday",), {"device": {"phone", "tv"}})
    fusion = ContextFusion(space, WIDTH)
    states, codes = torch.randn(3, WIDTH), torch.from_numpy(np.array([0, 1 + (2 << 3), 7 + (3 << 3)]))
    torch.testing.assert_close(fusion(states, codes), states, rtol=0, atol=0)
    torch.nn.init.normal_(fusion.down.weight)
    weekday, device = (table.weight for table in fusion.fields)
    context = torch.stack([weekday[0] + device[0], weekday[1] + device[2], weekday[7] + device[0]])  # device 3 is of a later version
    hidden = torch.cat([states, context], 1) @ fusion.up.weight.T + fusion.up.bias
    torch.testing.assert_close(fusion(states, codes), states + F.silu(hidden) @ fusion.down.weight.T)
