"""Normalises text: valid, printable, with single blanks, and of bounded length."""

import re

MAX_TEXT_CHARACTERS = 2000
"""Longer text is cut; no backbone here reads that much of an item."""

UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
"""Control characters, but for those that are whitespace, lone surrogates, and what readers put for broken text."""


def normalise_text(text: str) -> str:
    """Remove control characters and lone surrogates, fold whitespace, cut at MAX_TEXT_CHARACTERS."""
    return cut(fold(text))


def fold(text: str) -> str:
    """Remove control characters and lone surrogates, and make one blank of all whitespace between words."""
    return " ".join(UNPRINTABLE.sub("", text).split())


def cut(text: str) -> str:
    """Keep at most MAX_TEXT_CHARACTERS."""
    return text[:MAX_TEXT_CHARACTERS].rstrip()
