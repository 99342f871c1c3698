"""Turns a pydantic error into one line that says what would work."""

import difflib
import json

from pydantic import BaseModel, ValidationError

from recsys.config.base import fields_of, section_of


def explain(error: ValidationError, tree: type[BaseModel]) -> str:
    """Turn the first broken rule into one line: key, value, rule, and the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    fields = {known: field for known, field, _ in fields_of(tree)}
    if first["type"] == "extra_forbidden":
        section, _, name = key.rpartition(".")
        siblings = {known.rpartition(".")[2]: known for known in fields if known.rpartition(".")[0] == section}
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.0)
        return f"{key}: unknown key; did you mean {siblings[close[0]]}?"
    if first["type"] == "value_error":
        is_leaf = key in fields and section_of(fields[key]) is None
        return f"{key} = {json.dumps(first['input'], default=str)}: {first['ctx']['error']}" if is_leaf else str(first["ctx"]["error"])
    parts = key.split(".")
    while len(parts) > 1 and ".".join(parts) not in fields:  # below a key are places in a list, and names of alternatives
        parts.pop()
    return f"{'.'.join(parts)} = {json.dumps(first['input'], default=str)}: {first['msg']}"
