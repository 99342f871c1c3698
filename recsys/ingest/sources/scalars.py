"""Converts Arrow columns of any type to text, numbers and lists, with one spelling per value."""

import ast
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import UserError

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_POINT_ZERO = r"^\s*(-?\d+)\.0+\s*$"
_NAME_FIELDS = ("name", "title", "label", "value")
"""Fields that name a struct in a list, the preferred one first; else its first text field, else its first scalar field."""

_LONGEST_LIST = 1 << 16
_LONGEST_NUMBER = 400

_EXACT_FLOATS = {pa.float16(): 2.0**11, pa.float32(): 2.0**24, pa.float64(): 2.0**53}
"""Up to this number, a float of each width represents every whole number."""


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain type for equivalent ones: large, view, dictionary and fixed-size types, and extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.string() if isinstance(kind, pa.UuidType) else plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert a column to its plain type."""
    kind = plain_type(column.type)
    if isinstance(column.type, pa.UuidType):
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    return column if kind == column.type else column.cast(kind)


def spell(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Spell scalars, or the entries of lists of them, as `texts_of` does."""
    if not is_list(column.type):
        return texts_of(column)
    lists = column.combine_chunks()
    return rebuild(lists, texts_of(pa.chunked_array([lists.flatten()])).combine_chunks())


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's list types."""
    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, name)(kind) for name in names)


def is_text(column: pa.ChunkedArray) -> bool:
    """Return whether a column is text, or bytes that are all valid UTF-8."""
    if pa.types.is_binary(column.type):
        return _casts(column, pa.string())
    return pa.types.is_string(column.type)


def is_number(kind: pa.DataType) -> bool:
    """Return whether a type reads as numbers: numbers, dates, times and durations."""
    return any(
        getattr(pa.types, name)(kind)
        for name in ("is_integer", "is_floating", "is_decimal", "is_date", "is_time", "is_timestamp", "is_duration")
    )


def texts_of(column: pa.ChunkedArray, broken: str = "replace") -> pa.ChunkedArray:
    r"""Spell values of any scalar type as text; the same value has the same text in every type.

    Whole numbers have no point and no exponent; other numbers have the fewest digits that identify them. Booleans are "true" and "false".
    Bytes are decoded as UTF-8; a value that is not UTF-8 is written in hexadecimal after 0x. In strings, `broken` selects what replaces
    invalid UTF-8: "replace" puts U+FFFD, "backslashreplace" puts \xNN, so that different strings stay different.

    Raises:
        ArrowNotImplementedError: the type has no text form, such as a list.
    """
    kind = column.type
    if pa.types.is_string(kind):
        return _valid(column, lambda text: text.decode("utf-8", broken))
    if pa.types.is_binary(kind):
        return _valid(column, _hexadecimal)
    if pa.types.is_floating(kind):
        return _by_distinct(column, lambda value: None if value - value != 0 else _float_text(value, kind))
    if pa.types.is_decimal(kind) and kind.scale != 0:
        return _by_distinct(column, _decimal_text)
    return column.cast(pa.string())


def _float_text(value: float, kind: pa.DataType) -> str:
    if value == int(value):
        return str(int(value))
    narrow = {pa.float16(): np.float16, pa.float32(): np.float32}.get(kind, np.float64)
    return _decimal_text(Decimal(str(narrow(value))))


def _decimal_text(value: Decimal) -> str:
    text = format(value, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text).removeprefix("-" if not value else "")


def _hexadecimal(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"


def _by_distinct(column: pa.ChunkedArray, text_of: Callable[[Any], str | None]) -> pa.ChunkedArray:
    """Spell each distinct value once."""
    encoded = column.combine_chunks().dictionary_encode()
    texts = pa.array([text_of(value) for value in encoded.dictionary.to_pylist()], pa.string())
    return pa.chunked_array([texts.take(encoded.indices)])


def _valid(column: pa.ChunkedArray, decode: Callable[[bytes], str]) -> pa.ChunkedArray:
    raw = column.cast(pa.binary())
    if _casts(raw, pa.string()):
        return raw.cast(pa.string())
    return pa.chunked_array([[None if text is None else decode(text) for text in raw.to_pylist()]], pa.string())


def _casts(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def ids_of(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Spell ids of any type by `recsys.schema.normalize_id`; an empty one is null.

    Raises:
        UserError: the type of the column `name` cannot be an id, such as a list.
    """
    try:
        texts = pc.utf8_trim_whitespace(pc.utf8_normalize(texts_of(column, "backslashreplace"), form="NFC"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{name}': {column.type} cannot be read as text ({error})") from error
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def without_point_zero(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strip `.0` from whole numbers in text; tools write it when a missing number turns a column into floats."""
    return pc.replace_substring_regex(column, _POINT_ZERO, r"\1") if pa.types.is_string(column.type) else column


def may_be_rounded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return which ids may have lost digits upstream: floats beyond the integers that their type represents exactly."""
    if not pa.types.is_floating(column.type):
        return pa.chunked_array([pa.array(np.zeros(len(column), bool))])
    return pc.fill_null(pc.greater(pc.abs(column.cast(pa.float64())), _EXACT_FLOATS[column.type]), False)


def numbers_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert values of any scalar type to float64; a value that is not a number is null.

    True is 1 and false is 0, also as text. Dates are days and timestamps are seconds since 1970; times of day and durations are seconds.
    """
    column = texts_of(column) if pa.types.is_binary(column.type) else column
    kind = column.type
    if pa.types.is_string(kind):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        truth = pc.if_else(pc.equal(text, "true"), "1", pc.if_else(pc.equal(text, "false"), "0", text))
        column = pc.if_else(pc.match_substring_regex(truth, NUMBER), truth, pa.scalar(None, pa.string()))
    elif pa.types.is_date(kind):
        column = column.cast(pa.date32()).cast(pa.int32())
    elif pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        counts = column.cast(pa.int32() if pa.types.is_time32(kind) else pa.int64())
        return pc.divide(counts.cast(pa.float64(), safe=False), float(per_second(kind.unit)))
    try:
        return column.cast(pa.float64(), safe=False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.chunked_array([pa.nulls(len(column), pa.float64())])


def per_second(unit: str) -> int:
    """Return how many of a time unit make a second."""
    return {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]


def rebuild(lists: pa.Array, values: pa.Array) -> pa.ChunkedArray:
    """Return lists with the lengths and nulls of `lists`, but other values."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = lists.is_null() if lists.null_count else None
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, values, mask=mask)])


def simple_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert lists to lists of scalars: nested lists are concatenated, a struct becomes the field that names it."""
    lists = column.combine_chunks()
    values = lists.flatten()
    if is_list(values.type):
        joined = [None if row is None else [entry for inner in row for entry in inner or ()] for row in lists.to_pylist()]
        return simple_lists(pa.chunked_array([pa.array(joined, values.type)]))
    if pa.types.is_struct(values.type) and (name := name_field(values.type)):
        return rebuild(lists, pc.struct_field(values, name))
    return column


def name_field(kind: pa.StructType) -> str | None:
    """Return the field that names a struct; None if it has no scalar field."""
    scalars = [field for field in kind if pa.types.is_string(field.type) or is_number(field.type)]
    return _naming([field.name for field in scalars], [field.name for field in scalars if pa.types.is_string(field.type)])


def name_key(value: dict[str, Any]) -> str | None:
    """Return the key that names a JSON object, by the rule of `name_field`."""
    scalars = [key for key, entry in value.items() if isinstance(entry, (str, int))]
    return _naming(scalars, [key for key in scalars if isinstance(value[key], str) and not isinstance(value[key], JsonNumber)])


def _naming(scalars: list[str], texts: list[str]) -> str | None:
    known = [name for wanted in _NAME_FIELDS for name in scalars if name.lower() == wanted]
    return next(iter([*known, *texts, *scalars]), None)


def parsed_lists(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Parse text that holds lists, as JSON or as Python prints them; None if any text is something else."""
    texts = pc.utf8_trim_whitespace(spell(column))
    is_empty = pc.fill_null(pc.equal(texts, ""), True)
    if not pc.all(pc.or_(is_empty, pc.fill_null(pc.starts_with(texts, "["), False))).as_py():
        return None
    lists = [None if not text else _parse_list(text) for text in texts.to_pylist()]
    if any(found is None and not empty for found, empty in zip(lists, is_empty.to_pylist(), strict=True)):
        return None
    try:
        return plain(pa.chunked_array([pa.array(lists)])) if any(lists) else None
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _parse_list(text: str) -> list[Any] | None:
    if len(text) > _LONGEST_LIST:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return found if isinstance(found, list) else None
    return None


class JsonNumber(str):
    """The text of a JSON number that is not an integer; its type distinguishes it from other text."""

    __slots__ = ()


def json_number(text: str) -> JsonNumber:
    """Spell a JSON number that is not an integer like the same number in other formats."""
    value = Decimal(text)
    return JsonNumber(_decimal_text(value) if abs(value.adjusted()) < _LONGEST_NUMBER else text)
