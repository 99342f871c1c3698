"""Names and numbers as the labels of plots."""

_MOST_CHARACTERS = 22


def compact(number: float) -> str:
    """Write a number in few characters: 950, 1.2k, 30M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def readable(text: str) -> str:
    """Make a name that comes from data fit for a label: no control characters, no line breaks, not long."""
    plain = " ".join("".join(letter if letter.isprintable() or letter.isspace() else "\ufffd" for letter in text).split())
    return plain if len(plain) <= _MOST_CHARACTERS else plain[: _MOST_CHARACTERS - 1] + "\u2026"
