"""A hash of whole numbers that is the same on every machine, device and version; what is hashed is its callers' matter."""

from torch import Tensor

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stable_hash(numbers: Tensor, seed: int) -> Tensor:
    """Hash int64 numbers to int64 from 0 to 2^63 - 1, another way for each seed: splitmix64 (Steele et al. 2014)."""
    words = numbers + _signed(_STEP * (seed + 1))
    words = (words ^ _shift(words, 30)) * _signed(_FIRST)  # wraps at 64 bits
    words = (words ^ _shift(words, 27)) * _signed(_SECOND)
    return (words ^ _shift(words, 31)) & (2**63 - 1)


def sample_draws(sample_ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Draw a number for each sample, another one in each epoch, to be hashed further: what is drawn is the same on any number of ranks."""
    return stable_hash(stable_hash(sample_ids, seed), epoch)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros whatever the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Read the lowest 64 bits as a signed number, the only kind that tensors hold."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
