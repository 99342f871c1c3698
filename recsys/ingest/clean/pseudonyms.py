"""Keyed pseudonyms of user ids; the key stays in the environment of each process."""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from recsys.errors import UserError

PSEUDONYM_KEY = "pseudonym_key"
"""Role of the entry in a manifest's inputs that identifies the key."""

_MIN_KEY_BYTES = 16
_PSEUDONYM_CHARACTERS = 32
_IDENTITY_OF = b"recsys: which key user ids are hashed with"


def key_identity(variable: str) -> str:
    """Return a fingerprint of the key that does not reveal it; empty if `variable` is empty.

    Raises:
        UserError: the variable is not set, or its value is too short to be a key.
    """
    return hmac.new(_read_key(variable), _IDENTITY_OF, hashlib.sha256).hexdigest()[:16] if variable else ""


def refuse_other_key(variable: str, inputs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to append with another key than the base's, since every user would become a new one.

    Raises:
        UserError: the key is not the one in the base's `inputs`.
    """
    known = [entry["identity"] for entry in inputs if entry.get("role") == PSEUDONYM_KEY]
    if variable and known != [key_identity(variable)]:
        raise UserError(f"data.pseudonym_key_env = {variable}: holds another key than the base dataset was made with; set that one")


def pseudonymize(ids: pa.ChunkedArray, variable: str) -> pa.ChunkedArray:
    """Replace ids by the first 128 bits of their HMAC-SHA256, in hexadecimal; without a variable, return them unchanged.

    Raises:
        UserError: as `key_identity`; every worker reads the key from its own environment.
    """
    if not variable:
        return ids
    key = _read_key(variable)
    encoded = ids.combine_chunks().dictionary_encode()
    names = [hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:_PSEUDONYM_CHARACTERS] for text in encoded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(names, pa.string()).take(encoded.indices)])


def _read_key(variable: str) -> bytes:
    key = os.environ.get(variable, "").encode("utf-8", "surrogateescape")
    if len(key) < _MIN_KEY_BYTES:
        state = f"has {len(key)} bytes" if key else "is not set"
        raise UserError(
            f"data.pseudonym_key_env = {variable}: the environment variable {state}, here or on a worker; "
            f"it must hold a secret of at least {_MIN_KEY_BYTES} bytes, such as the output of: openssl rand -hex 32"
        )
    return key
