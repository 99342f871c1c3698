"""Pseudonyms: the keyed hash, the rules for a key, and the identity that distinguishes keys."""

import hashlib
import hmac

import pyarrow as pa
import pytest

from recsys.errors import UserError
from recsys.ingest.clean.pseudonyms import key_identity, pseudonymize

KEY = "correct horse battery staple"


def test_a_pseudonym_is_the_keyed_hash_of_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEPPER", KEY)
    ids = pa.chunked_array([["ann", "bob"], ["ann", "\u00e9"]])
    expected = [hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest()[:32] for text in ids.to_pylist()]
    assert pseudonymize(ids, "PEPPER").to_pylist() == expected
    assert pseudonymize(ids.slice(0, 0), "PEPPER").to_pylist() == []
    assert pseudonymize(ids, "") is ids


def test_the_identity_of_a_key_tells_keys_apart_and_not_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for key in (KEY, KEY, KEY + "!"):
        monkeypatch.setenv("PEPPER", key)
        identities.append(key_identity("PEPPER"))
    assert identities[0] == identities[1] != identities[2]
    assert key_identity("") == ""


@pytest.mark.parametrize(("key", "state"), [(None, "is not set"), ("", "is not set"), ("short", "has 5 bytes")])
def test_a_key_that_is_none_is_refused_without_saying_it(monkeypatch: pytest.MonkeyPatch, key: str | None, state: str) -> None:
    monkeypatch.delenv("PEPPER", raising=False)
    if key is not None:
        monkeypatch.setenv("PEPPER", key)
    for use in (lambda: key_identity("PEPPER"), lambda: pseudonymize(pa.chunked_array([["a"]]), "PEPPER")):
        with pytest.raises(UserError, match=state) as error:
            use()
        assert "short," not in str(error.value)
