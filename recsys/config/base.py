"""The base class `Section`, shared field types, facts about settings, and iteration over sections and their values."""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]


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
        yield f"{prefix}{name}", field, found
        if (below := section_of(field)) is not None:
            yield from fields_of(below, f"{prefix}{name}.", found)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section class of a field, or None if the field is a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`section.key`, value) for every value in nested sections."""
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
