"""A broken rule of the config as one line that says what would work; the rules themselves are in `config.py`."""

import difflib
import json
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, tree: type[BaseModel]) -> str:
    """Turn the first broken rule into one line: key, value, rule, and the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section, _, name = key.rpartition(".")
        siblings = {known.rpartition(".")[2]: known for known in _known_keys(tree) if known.rpartition(".")[0] == section}
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.0)
        return f"{key}: unknown key; did you mean {siblings[close[0]]}?"
    if first["type"] == "value_error":
        is_leaf = key in _leaf_keys(tree)
        return f"{key} = {json.dumps(first['input'], default=str)}: {first['ctx']['error']}" if is_leaf else str(first["ctx"]["error"])
    known = set(_known_keys(tree))
    parts = key.split(".")
    while len(parts) > 1 and ".".join(parts) not in known:  # below a key are places in a list, and names of alternatives
        parts.pop()
    return f"{'.'.join(parts)} = {json.dumps(first['input'], default=str)}: {first['msg']}"


def _leaf_keys(tree: type[BaseModel]) -> set[str]:
    known = set(_known_keys(tree))
    return {key for key in known if not any(other.startswith(f"{key}.") for other in known)}


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{prefix}{name}"
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
