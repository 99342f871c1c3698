"""The settings as text, from the docstrings of their fields, for `--help` and the settings page.

`python -m recsys.config.help_text > recsys/config/README.md` writes the page.
"""

import inspect
import json
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from recsys.config.base import fields_of, section_of
from recsys.config.root import Config
from recsys.config.verb_settings import reads

_HEAD = """# Settings

Every key of the config, from the docstrings in this folder. In a TOML file the sections are tables; `--set section.key=value`
overrides a key. `python -m jobs.train --help` prints the keys that a verb reads."""
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def help_text(verb: str) -> str:
    """Return the settings that a verb reads, by section: key, type, default and one sentence each."""
    lines: list[str] = []
    for key, field, _ in fields_of(Config):
        section = section_of(field)
        if section is not None and any(reads(verb, below) for below, *_ in fields_of(section, f"{key}.")):
            lines += ["", f"[{key}]  {_doc_lines(section)[0]}"]
        elif section is None and reads(verb, key):
            lines += [f"  {key} = {_default_text(field)}  ({_type_text(field)})", f"      {field.description}"]
    return "\n".join(lines).lstrip("\n")


def page() -> str:
    """Return the settings page in Markdown: a table for each section."""
    lines = [_HEAD]
    for key, field, _ in fields_of(Config):
        if (section := section_of(field)) is not None:
            lines += ["", f"## {key}", "", *_doc_lines(section), "", "| key | type | default | |", "| --- | --- | --- | --- |"]
        else:
            kind, description = (text.replace("|", r"\|") for text in (_type_text(field), field.description or ""))
            lines.append(f"| `{key}` | {kind} | `{_default_text(field)}` | {description} |")
    return "\n".join(lines) + "\n"


def _doc_lines(section: type[BaseModel]) -> list[str]:
    return str(inspect.getdoc(section)).splitlines()


def _default_text(field: FieldInfo) -> str:
    return "unset" if field.default is None else json.dumps(field.default)


def _type_text(field: FieldInfo) -> str:
    """Return a setting's type as text, such as `integer >= 1`."""
    return _schema_text(TypeAdapter(field.rebuild_annotation()).json_schema())


def _schema_text(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_schema_text(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "prefixItems" in schema:
        return f"[{', '.join(_schema_text(each) for each in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_schema_text(schema['items'])}"
    if schema.get("type") == "object":
        return f"table of {_schema_text(schema['additionalProperties'])}"
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return f"{schema.get('type', 'string')} {bounds}".strip()


if __name__ == "__main__":
    print(page(), end="")
