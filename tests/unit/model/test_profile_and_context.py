import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recsys.data.batch import PackedHistories, PackedProfiles
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace
from recsys.model.situations import MISSING_RATE, ContextFusion, ProfileEncoder
from recsys.model.user_encoder import FIRST_RATE, LongTermProfile

WIDTH = 6


def test_a_profile_is_the_mean_of_its_categories_plus_the_projected_numbers() -> None:
    space = ProfileSpace(numbers=("a", "b"), moments=((0, 1), (0, 1)), categories=("c",), vocabulary=("c=", "c=x", "c=y"))
    encoder = ProfileEncoder(space, WIDTH).eval()
    numbers = torch.tensor([[0.5, float("nan")], [float("nan"), float("nan")]])
    found = encoder(PackedProfiles(torch.tensor([2, 3, 1, 9]), torch.tensor([0, 2]), numbers), 2)
    table, projection = encoder.categories.weight, encoder.numbers
    assert projection is not None
    read = torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.0] * 4])
    expected = torch.stack([(table[2] + table[3]) / 2, table[1]])  # 9 is of a later version: unknown, and not counted
    torch.testing.assert_close(found, expected + read @ projection.weight.T + projection.bias)


def test_a_context_is_joined_by_the_plain_formula_and_begins_without_effect() -> None:
    space = ContextSpace.of(("weekday",), {"device": {"phone", "tv"}})
    fusion = ContextFusion(space, WIDTH).eval()
    states, codes = torch.randn(3, WIDTH), torch.from_numpy(np.array([0, 1 + (2 << 3), 7 + (3 << 3)]))
    torch.testing.assert_close(fusion(states, codes), states, rtol=0, atol=0)
    torch.nn.init.normal_(fusion.down.weight)
    assert space.names[:2] == ("weekday=", "weekday=monday")
    assert space.names[-3:] == ("device=", "device=phone", "device=tv")
    weekday, device = fusion.values.weight.split([8, 3])
    context = torch.stack([weekday[0] + device[0], weekday[1] + device[2], weekday[7] + device[0]])  # device 3 is of a later version
    hidden = torch.cat([states, context], 1) @ fusion.up.weight.T + fusion.up.bias
    torch.testing.assert_close(fusion(states, codes), states + F.silu(hidden) @ fusion.down.weight.T)


@pytest.mark.parametrize("rate", [FIRST_RATE, 0.7])
def test_the_long_term_profile_is_updated_place_by_place(rate: float) -> None:
    layer = LongTermProfile(WIDTH)
    torch.nn.init.constant_(layer.rate, torch.tensor(rate).logit().item())
    torch.nn.init.normal_(layer.down.weight)
    groups, states = ((2, 3), (1, 5)), torch.randn(11, WIDTH)
    nothing = torch.zeros(11, dtype=torch.long)
    expected, begin = [], 0
    for number, length in groups:
        for _ in range(number):
            profile = torch.zeros(WIDTH)
            for state in states[begin : begin + length]:
                profile = rate * state + (1 - rate) * profile
                expected.append(state + layer.down(profile))
            begin += length
    torch.testing.assert_close(layer(states, PackedHistories(nothing, nothing, nothing, nothing.float(), groups)), torch.stack(expected))


def test_training_takes_some_values_for_missing() -> None:
    space = ContextSpace.of(("weekday",), {})
    fusion = ContextFusion(space, WIDTH)
    torch.nn.init.normal_(fusion.down.weight)
    states, codes = torch.zeros(4000, WIDTH), torch.full((4000,), 3)
    is_missing = (fusion(states, codes) - fusion.eval()(states[:1], torch.zeros(1, dtype=torch.long))).abs().max(1).values < 1e-6
    assert is_missing.float().mean().item() == pytest.approx(MISSING_RATE, abs=0.03)
    profiles = ProfileSpace(categories=("c",), vocabulary=("c=", "c=x"))
    encoder = ProfileEncoder(profiles, WIDTH)
    found = encoder(PackedProfiles(torch.full((4000,), 2), torch.arange(4000), torch.zeros(4000, 0)), 4000)
    assert (found == encoder.categories.weight[1]).all(1).float().mean().item() == pytest.approx(MISSING_RATE, abs=0.03)
