"""The plan: every sample once per epoch, the same samples per step for any number of ranks, a position in O(1)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.plan import EpochPlan

plans = st.builds(
    EpochPlan,
    row_groups=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0).map(tuple),
    global_batch_size=st.integers(1, 64),
    window=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)


@settings(max_examples=500, deadline=None)
@given(plan=plans)
def test_every_sample_occurs_once_per_epoch(plan: EpochPlan) -> None:
    ids = np.concatenate([plan.step_ids(step) for step in range(plan.num_steps)])
    np.testing.assert_array_equal(np.sort(ids), np.arange(plan.num_samples))


@settings(max_examples=200, deadline=None)
@given(plan=plans, num_chunks=st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_the_chunks_of_a_step_are_its_samples_for_any_number_of_ranks(plan: EpochPlan, num_chunks: int) -> None:
    for step in range(plan.num_steps):
        chunks = [plan.chunk_ids(step, chunk, num_chunks) for chunk in range(num_chunks)]
        np.testing.assert_array_equal(np.sort(np.concatenate(chunks)), np.sort(plan.step_ids(step)))
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@settings(max_examples=200, deadline=None)
@given(plan=plans)
def test_a_step_needs_no_step_before_it(plan: EpochPlan) -> None:
    last = plan.num_steps - 1
    fresh = EpochPlan(plan.row_groups, plan.global_batch_size, plan.window, plan.seed, plan.epoch)
    in_order = [plan.step_ids(step) for step in range(plan.num_steps)]
    np.testing.assert_array_equal(fresh.step_ids(last), in_order[last])


@settings(max_examples=200, deadline=None)
@given(plan=plans)
def test_samples_are_found_in_their_row_groups(plan: EpochPlan) -> None:
    ids = plan.step_ids(0)
    groups, rows = plan.locate(ids)
    begins = np.concatenate([[0], np.cumsum(plan.row_groups)])[:-1]
    np.testing.assert_array_equal(begins[groups] + rows, ids)
    assert (rows < np.asarray(plan.row_groups)[groups]).all()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    base = EpochPlan((50, 50, 50), 16, 2, seed=1, epoch=0)
    assert (base.step_ids(0) == EpochPlan((50, 50, 50), 16, 2, seed=1, epoch=0).step_ids(0)).all()
    assert (base.step_ids(0) != EpochPlan((50, 50, 50), 16, 2, seed=2, epoch=0).step_ids(0)).any()
    assert (base.step_ids(0) != EpochPlan((50, 50, 50), 16, 2, seed=1, epoch=1).step_ids(0)).any()
