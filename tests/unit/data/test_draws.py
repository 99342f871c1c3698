"""The stable hash: splitmix64 of integers of any size, evenly distributed, different for each seed."""

import pytest
import torch

from recsys.data.draws import stable_hash

WORD = (1 << 64) - 1


def plain_hash(number: int, seed: int) -> int:
    word = (number + 0x9E3779B97F4A7C15 * (seed + 1)) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return (word ^ (word >> 31)) & (2**63 - 1)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_it_is_splitmix64(seed: int) -> None:
    numbers = [*range(50), 2**40 + 1, 2**62 + 12345, -1]
    assert stable_hash(torch.tensor(numbers), seed).tolist() == [plain_hash(number, seed) for number in numbers]


def test_its_first_value_is_the_one_that_the_authors_print() -> None:
    assert plain_hash(1234567, 0) == 6457827717110365317  # the first output of splitmix64 with seed 1234567


def test_buckets_are_filled_evenly_and_seeds_differ() -> None:
    numbers = torch.arange(100_000)
    first, second = stable_hash(numbers, 0), stable_hash(numbers, 1)
    for hashes in (first, second, first ^ second):
        counts = torch.bincount(hashes % 100, minlength=100).double()
        assert float((counts - 1000).square().sum() / 1000) < 150  # chi-squared with 99 degrees of freedom
