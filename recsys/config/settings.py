"""The settings as text: what `--help` prints and the settings page, both from the docstrings of the fields.

`python -m recsys.config.settings > recsys/config/README.md` writes the page.
"""

import inspect
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from recsys.config.base import fields_of, section_of
from recsys.config.tree import Config
from recsys.config.use import READS, STAGES, reads

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def help_text(verb: str) -> str:
    """Return the settings that a verb reads, by section: key, type, default and one sentence each."""
    lines: list[str] = []
    for key, field, _ in fields_of(Config):
        section = section_of(field)
        if section is not None and any(reads_setting(verb, below) for below, *_ in fields_of(section, f"{key}.")):
            lines += ["", f"[{key}]  {_first_line(section)}"]
        elif section is None and reads_setting(verb, key):
            lines += [f"  {key} = {default_of(field)}  ({type_of(field)})", f"      {field.description}"]
    return "\n".join(lines).lstrip("\n")


def reads_setting(verb: str, key: str) -> bool:
    """Return whether a verb reads a key; the pipeline with all of its stages."""
    return reads(verb, key, STAGES) if verb == "jobs.pipeline" else verb in READS and reads(verb, key)


def page() -> str:
    """Return the settings page in Markdown: a table for each section."""
    return "\n".join(_page_lines()) + "\n"


def _page_lines() -> Iterator[str]:
    yield "# Settings"
    yield ""
    yield "Every key of the config, from the docstrings in this folder. A TOML file has the sections as tables; `--set section.key=value`"
    yield "overrides a key. `python -m jobs.train --help` prints the keys that a verb reads."
    for key, field, _ in fields_of(Config):
        section = section_of(field)
        if section is not None:
            yield from ("", f"## {key}", "", *(inspect.getdoc(section) or "").splitlines())
            if any(section_of(below) is None for below in section.model_fields.values()):
                yield from ("", "| key | type | default | |", "| --- | --- | --- | --- |")
        else:
            kind = type_of(field).replace("|", "\\|")
            yield f"| `{key}` | {kind} | `{default_of(field)}` | {(field.description or '').replace('|', chr(92) + '|')} |"


def type_of(field: FieldInfo) -> str:
    """Return a setting's type in words, such as `integer >= 1`."""
    return _type_text(TypeAdapter(field.rebuild_annotation()).json_schema())


def default_of(field: FieldInfo) -> str:
    """Return a setting's default as TOML; `unset` for None."""
    return "unset" if field.default is None else json.dumps(field.default)


def _type_text(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_type_text(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "prefixItems" in schema:
        return f"[{', '.join(_type_text(each) for each in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_type_text(schema['items'])}"
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return f"{schema.get('type', 'string')} {bounds}".strip()


def _first_line(section: type[BaseModel]) -> str:
    return (inspect.getdoc(section) or "").partition("\n")[0]


if __name__ == "__main__":
    print(page(), end="")
