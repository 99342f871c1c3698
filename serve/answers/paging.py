"""Page tokens: which items were on the pages before, so that no page repeats one, whatever has changed in between."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recsys.arrays import Integers

HASH_BYTES = 6
"""So that a hash is eight characters of a token."""

TOKEN_PATTERN = r"^([A-Za-z0-9_-]{8})*$"
MAX_PAGED = 2000
"""Items on all pages of one list together."""


class Pages:
    """Page tokens for one catalogue. A token holds hashes of item ids, so it outlives the version that made it."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self._item_ids = item_ids  # (I + 1,), "" first

    def shown(self, token: str | None) -> tuple[Integers, bytes]:
        """Return the catalogue's items that a token of TOKEN_PATTERN holds, and its hashes, which may include items that are gone."""
        packed = base64.urlsafe_b64decode(token or "")
        hashes = _numbers(packed)
        known, order = self._hashes
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return order[places[known[places] == hashes]], packed

    def token(self, before: bytes, items: Integers) -> str | None:
        """Return the token for the page after one with these items; None if there is no further page."""
        packed = before + b"".join(_hash(self._item_ids[item]) for item in items.tolist())
        is_last = not len(items) or len(packed) >= MAX_PAGED * HASH_BYTES
        return None if is_last else base64.urlsafe_b64encode(packed).decode()

    @cached_property
    def _hashes(self) -> tuple[NDArray[np.uint64], Integers]:
        """Return the sorted hashes of all items, and the item of each."""
        hashes = _numbers(b"".join(map(_hash, self._item_ids)))
        order = np.argsort(hashes)
        return hashes[order], order


def _numbers(packed: bytes) -> NDArray[np.uint64]:
    """Return hashes as numbers."""
    rows = np.zeros((len(packed) // HASH_BYTES, 8), np.uint8)
    rows[:, :HASH_BYTES] = np.frombuffer(packed, np.uint8).reshape(-1, HASH_BYTES)
    return rows.view(np.uint64)[:, 0]


def _hash(item_id: str) -> bytes:
    return hashlib.blake2b(item_id.encode(), digest_size=HASH_BYTES).digest()
