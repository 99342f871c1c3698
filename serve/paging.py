"""Page tokens: which items were on the pages before, so that no page repeats one, whatever has changed in between."""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recsys.arrays import Integers
from serve.api.problems import RefusedError

HASH_BYTES = 8
MAX_PAGED = 2000
"""Items on all pages of one list together."""


class Pages:
    """Page tokens for one catalogue. A token holds hashes of item ids, so it outlives the version that made it."""

    def __init__(self, item_ids: Sequence[str]) -> None:
        self._item_ids = item_ids  # (I + 1,), "" first

    def shown(self, token: str | None) -> tuple[Integers, bytes]:
        """Return the catalogue's items that a token holds, and its hashes, which may include items that are gone.

        Raises:
            RefusedError: it is not a token.
        """
        if not token:
            return np.zeros(0, np.int64), b""
        try:
            packed = base64.b64decode(token.encode("ascii"), b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            packed = b"?"
        if len(packed) % HASH_BYTES:
            raise RefusedError(422, "page_token: is not a token of an answer")
        hashes = np.frombuffer(packed, np.uint64)
        known, order = self._hashes
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return order[places[known[places] == hashes]], packed

    def token(self, before: bytes, items: Integers) -> str | None:
        """Return the token for the page after one with these items; None if there is no further page."""
        packed = before + b"".join(_hash(self._item_ids[item]) for item in items.tolist())
        is_last = not len(items) or len(packed) >= MAX_PAGED * HASH_BYTES
        return None if is_last else base64.b64encode(packed, b"-_").decode()

    @cached_property
    def _hashes(self) -> tuple[NDArray[np.uint64], Integers]:
        """Return the sorted hashes of all items, and the item of each."""
        hashes = np.frombuffer(b"".join(map(_hash, self._item_ids)), np.uint64)
        order = np.argsort(hashes)
        return hashes[order], order


def _hash(item_id: str) -> bytes:
    return hashlib.blake2b(item_id.encode(), digest_size=HASH_BYTES).digest()
