"""Text as a dataset has it: valid, printable, whitespace folded, and no longer than anything here reads; which text, others say."""

import re

import pyarrow as pa

MAX_TEXT_CHARACTERS = 2000
"""Longer text is cut; no backbone here reads that much of an item."""

UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
"""Control characters, but for those that are whitespace, lone surrogates, and what readers put for broken text."""


def valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Put U+FFFD where strings, or lists of them, are not valid UTF-8, such as lone surrogates in a Parquet file."""
    is_list = pa.types.is_list(column.type)
    raw = column.cast(pa.list_(pa.binary()) if is_list else pa.binary())
    try:
        return raw.cast(column.type)
    except pa.ArrowInvalid:
        rows = raw.to_pylist()
    mended = [[_decode(text) for text in row] if isinstance(row, list) else _decode(row) for row in rows]
    return pa.chunked_array([mended], column.type)


def _decode(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", "replace")


def normalise_text(text: str) -> str:
    """Remove control characters and lone surrogates, fold whitespace, cut at MAX_TEXT_CHARACTERS."""
    return cut(fold(text))


def fold(text: str) -> str:
    """Remove control characters and lone surrogates, and make one blank of all whitespace between words."""
    return " ".join(UNPRINTABLE.sub("", text).split())


def cut(text: str) -> str:
    """Keep at most MAX_TEXT_CHARACTERS."""
    return text[:MAX_TEXT_CHARACTERS].rstrip()
