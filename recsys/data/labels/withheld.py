"""Draws that depend only on a key, and the users who are withheld from training. Does not import torch."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from recsys.arrays import Floats, Mask


def draw(keys: Iterable[str], seed: int) -> Floats:
    """Return a number in [0, 1) for each key: a hash of the key and the seed, the same on every machine and in every release."""
    digests = (hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest() for key in keys)
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.float64) / 2.0**48


def drawn(name: str, ids: pa.Array | pa.ChunkedArray, share: float, seed: int) -> Mask:
    """Draw about a `share` of ids, each by its own draw."""
    return draw((f"{name} {key}" for key in ids.to_pylist()), seed) < share if share else np.zeros(len(ids), bool)


def withheld_users(user_ids: pa.Array | pa.ChunkedArray, share: float, seed: int) -> Mask:
    """Return which users are kept out of training (`data.withheld_users`, `data.split_seed`)."""
    return drawn("withheld user", user_ids, share, seed)
