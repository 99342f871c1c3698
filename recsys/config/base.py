"""The base class `Section`, shared field types, facts about settings, and iteration over sections and their values."""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]


ANY = "NAME"
"""Stands for any name in the key of a table of sections."""


class Fact(Enum):
    """A property of a setting besides its type, written in its annotation. A fact about a section applies to all of its fields."""

    PATH = "a local path or URI; `load_config` makes a relative path absolute"
    PATH_OR_NAME = "a name, or a path that `load_config` makes absolute if such a folder exists"
    INPUT = "where raw input is and how its files are written; irrelevant once the dataset exists"
    MACHINE = "how a run is computed; irrelevant for its result"
    MAY_CHANGE = "may differ from the checkpoint's config when a run resumes"
    SEARCHED = "varied by `tune.search`; each trial has its own value"


class Section(BaseModel):
    """A frozen part of the config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def fields_of(
    section: type[BaseModel], prefix: str = "", facts: frozenset[Fact] = frozenset()
) -> Iterator[tuple[str, FieldInfo, frozenset[Fact]]]:
    """Yield key, field and facts of a section's settings, then of each nested section followed by its own settings."""
    for name, field in sorted(section.model_fields.items(), key=lambda named: section_of(named[1]) is not None):
        found = facts | {each for each in field.metadata if isinstance(each, Fact)}
        key = f"{prefix}{name}.{ANY}" if get_origin(field.annotation) is dict and section_of(field) else f"{prefix}{name}"
        yield key, field, found
        if (below := section_of(field)) is not None:
            yield from fields_of(below, f"{key}.", found)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section class of a field, or of the values of a table of sections; None if the field is a setting."""
    kind = get_args(field.annotation)[1] if get_origin(field.annotation) is dict else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`section.key`, value) for every value in nested sections; an empty section is a value."""
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
