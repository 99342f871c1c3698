"""The plan: every sample once per epoch, the same samples per step for any number of ranks, seeking in O(1)."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.plan import MIN_SLICES, SLICE_ROWS, EpochPlan, _permutation

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12)

plans = st.builds(
    EpochPlan,
    row_groups=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0).map(tuple),
    global_batch_size=st.integers(1, 64),
    streams=st.sampled_from([1, 5, 12, 24, 48]),
    window=st.integers(0, 5),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    first_new=st.integers(0, 29),
    replay=st.none() | st.floats(0, 5) | st.just(1e300),
).filter(lambda plan: plan.num_samples > 0)


def all_ids(plan: EpochPlan) -> list[list[int]]:
    return [plan.step_ids(step).tolist() for step in range(plan.num_steps)]


def flat(plan: EpochPlan) -> list[int]:
    return [sample for step in all_ids(plan) for sample in step]


def check_samples(plan: EpochPlan) -> None:
    """Check that all samples occur once; with a replay all new ones, and as many others as it says."""
    ids = flat(plan)
    assert len(set(ids)) == len(ids) == plan.num_samples
    num_old = sum(plan.row_groups[: plan.first_new])
    if plan.replay is None:
        assert sorted(ids) == list(range(sum(plan.row_groups)))
    else:
        new = range(num_old, sum(plan.row_groups))
        assert set(new) <= set(ids) <= set(range(new.stop))
        assert len(ids) - len(new) == round(min(num_old, plan.replay * len(new)))


def check_every_sample_once_and_every_step_the_same(plan: EpochPlan, world_size: int, data: st.DataObject) -> None:
    steps = all_ids(plan)
    check_samples(plan)
    assert all(len(step) == plan.global_batch_size for step in steps[:-1])
    step = data.draw(st.integers(0, plan.num_steps - 1))
    fresh = replace(plan)  # a copy without state of earlier steps
    shares = [fresh.step_ids(step, rank, world_size).tolist() for rank in range(world_size)]
    assert sorted(sample for share in shares for sample in share) == sorted(steps[step])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


on_drawn_plans = given(plan=plans, world_size=st.sampled_from(WORLD_SIZES), data=st.data())


@settings(max_examples=1_000)
@on_drawn_plans
def test_every_sample_once_and_every_step_the_same_for_any_number_of_ranks(plan: EpochPlan, world_size: int, data: st.DataObject) -> None:
    check_every_sample_once_and_every_step_the_same(plan, world_size, data)


@pytest.mark.slow
@settings(max_examples=10_000)
@on_drawn_plans
def test_so_it_is_for_ten_thousand_plans(plan: EpochPlan, world_size: int, data: st.DataObject) -> None:
    check_every_sample_once_and_every_step_the_same(plan, world_size, data)


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 5, 7, 16, 24, 48])
@pytest.mark.parametrize("global_batch_size", [1, 48, 120, 1000])
@pytest.mark.parametrize("replay", [None, 0.0, 1.5])
def test_every_rank_at_every_step(world_size: int, global_batch_size: int, replay: float | None) -> None:
    sizes = (97, 3, 0, 250, 1, 64, 64, 64, 31)
    plan = EpochPlan(sizes, global_batch_size, streams=48, window=2, seed=3, epoch=1, first_new=5, replay=replay)
    for step, expected in enumerate(all_ids(plan)):
        dealt = np.empty(len(expected), np.int64)
        first = step * global_batch_size
        for rank in range(world_size):
            dealt[(rank - first) % world_size :: world_size] = plan.step_ids(step, rank, world_size)
        assert dealt.tolist() == expected


@settings(max_examples=300)
@given(plan=plans)
def test_streams_share_the_samples_to_the_row_and_windows_tile_them(plan: EpochPlan) -> None:
    lengths = []
    rows = []
    for stream in range(plan.num_streams):
        windows = plan.windows(stream)
        assert [window.begin for window in windows] == np.cumsum([0, *(window.num_samples for window in windows)])[: len(windows)].tolist()
        assert all(len(window.spans) <= max(1, plan.window) for window in windows)
        lengths.append(sum(window.num_samples for window in windows))
        rows += [sample for window in windows for sample in plan.line_ids(window)[plan.shuffle(window)].tolist()]
    assert max(lengths) - min(lengths) <= 1
    assert sorted(rows) == sorted(flat(plan))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8, 12, 24, 48])
def test_a_rank_touches_its_own_row_groups_and_shares_only_those_that_a_cut_divides(world_size: int) -> None:
    plan = EpochPlan((100,) * 960, 240, streams=48, window=4, seed=0, epoch=0)
    readers: dict[int, set[int]] = {}
    for stream in range(48):
        for window in plan.windows(stream):
            for group, *_ in window.spans:
                readers.setdefault(group, set()).add(stream % world_size)
    assert sum(len(ranks) > 1 for ranks in readers.values()) <= 47
    assert len(readers) == 960


def test_a_position_needs_as_many_windows_anywhere_as_at_the_start() -> None:
    plan = EpochPlan((1000,) * 20_000, 480, streams=48, window=2, seed=0, epoch=0)

    def shuffled_windows(step: int) -> int:
        _permutation.cache_clear()
        replace(plan).step_ids(step)
        return _permutation.cache_info().misses

    assert [shuffled_windows(step) for step in (0, plan.num_steps // 2, plan.num_steps - 1)] == [48, 48, 48]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    base = EpochPlan((50, 50, 50), 16, 12, 2, seed=1, epoch=0)
    assert all_ids(base) == all_ids(replace(base))
    assert flat(replace(base, global_batch_size=25)) == flat(base)
    assert all_ids(replace(base, seed=2)) != all_ids(base)
    assert all_ids(replace(base, epoch=1)) != all_ids(base)


def test_without_a_window_the_order_is_that_of_the_shards() -> None:
    plan = EpochPlan((7, 5, 9), 4, 12, 0, seed=1, epoch=3)
    assert flat(plan) == list(range(21))


def test_shuffling_takes_neighbours_apart() -> None:
    plan = EpochPlan((1000,) * 48, 96, streams=48, window=1, seed=0, epoch=0)
    groups = np.array(all_ids(plan)[0]) // 1000
    assert len(set(groups.tolist())) == 48
    rows = np.array(flat(plan)).reshape(-1, 48)[:, 0] % 1000
    assert np.abs(np.diff(rows)).mean() > 200


def test_without_replay_the_order_is_that_of_earlier_releases() -> None:
    plan = EpochPlan((97, 3, 0, 250, 1, 64, 64, 64, 31), 7, streams=12, window=2, seed=3, epoch=1, first_new=5)
    digest = hashlib.sha256(np.array(flat(plan)).tobytes()).hexdigest()
    assert digest == "2bac4a8ff5da68ea2526ad5924db48d5cbe45375dd9268a9fa1502f403103ddd"


def test_a_replay_reads_as_many_row_groups_as_the_day_needs_however_long_the_history_is() -> None:
    day = (1000,) * 4
    for num_old in (20, 2_000, 20_000):
        for replay, num_slices in ((0.5, MIN_SLICES), (10.0, -(-40_000 // SLICE_ROWS))):
            plan = EpochPlan((1000,) * num_old + day, 480, streams=48, window=2, seed=0, epoch=0, first_new=num_old, replay=replay)
            num_samples = 4_000 + min(round(4_000 * replay), 1000 * num_old)
            assert (plan.num_samples, plan.num_steps) == (num_samples, -(-num_samples // 480))
            spans = [span for stream in range(48) for window in plan.windows(stream) for span in window.spans]
            groups = {group for group, *_ in spans}
            assert len(groups) <= len(day) + 1.5 * num_slices  # row groups are no multiple of a slice
            if num_old > 1000:
                assert len(groups) > len(day) + num_slices / 2


def test_a_replay_draws_other_slices_each_epoch_and_in_time_all_samples() -> None:
    base = EpochPlan((300, 40, 700, 512, 100), 16, streams=12, window=2, seed=1, epoch=0, first_new=4, replay=3)
    assert flat(base) == flat(replace(base))
    num_old = sum(base.row_groups[: base.first_new])
    counts = np.zeros(num_old)
    for epoch in range(400):
        old = np.array([sample for sample in flat(replace(base, epoch=epoch)) if sample < num_old])
        assert len(old) == 300
        counts[old] += 1
    assert counts.min() > 0
    by_group = [part.mean() for part in np.split(counts, np.cumsum(base.row_groups[:3]))]
    np.testing.assert_allclose(by_group, 400 * 300 / num_old, rtol=0.25)


def test_a_replay_without_a_window_keeps_the_order_of_the_shards() -> None:
    plan = EpochPlan((7, 5, 9), 4, 12, 0, seed=1, epoch=3, first_new=2, replay=0.7)
    order = flat(plan)
    assert order == sorted(order)
    assert order[-9:] == list(range(12, 21))
    assert len(order) == 15
