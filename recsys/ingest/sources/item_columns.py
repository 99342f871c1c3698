"""Infers the kind of each catalogue column (text, category, number or vector), or the reason why it is not used."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import UserError
from recsys.ingest.sources.scalars import is_list, is_number, is_text, numbers_of, parsed_lists, simple_lists, spell
from recsys.ingest.sources.text_files import JSON_VALUE, TEXT, WHOLE_JSON
from recsys.schema import FeatureKind

TITLE_NAMES = ("title", "name", "product_title", "product_name", "item_title", "item_name", "headline")
"""Names of the title column, the preferred one first, in any spelling; else a name that ends with `_title`."""

AN_INDEX = "an index column written by pandas"
_INDEX_NAME = re.compile(r"__index_level_\d+__|Unnamed: \d+(\.\d+|_level_\d+)*|")
_INDEX_COLUMNS = ("index", "level_0")
_MISSING_NUMBERS = ("", "none", "null", "nan", "na", "n/a", "-", "\u2014")
_VECTOR_ENDS = " \t\r\n,;|[]()"
_VECTOR_SEPARATOR = r"[\s,;|]+"


def is_index_name(name: str) -> bool:
    """Return whether pandas gives this name to an unnamed index."""
    return _INDEX_NAME.fullmatch(name) is not None


def title_column(names: list[str]) -> str | None:
    """Return the title column by its name; None if no name fits."""
    spelled = {name: re.sub(r"[-. ]", "_", name.strip().lower()) for name in names}
    for wanted in TITLE_NAMES:
        found = next((name for name in names if spelled[name] == wanted), None)
        if found is not None:
            return found
    return next((name for name in names if spelled[name].endswith("_title")), None)


def infer_kind(name: str, column: pa.ChunkedArray, declared: str, is_title: bool) -> tuple[FeatureKind | None, str]:
    """Return a column's kind, or None and the reason it is not used.

    `column` has a plain type (see `scalars.plain`), and its lists hold scalars; `declared` is the type that the file declares. Lists of
    floats or decimals are vectors, other lists categories. Numbers, dates, times and durations are numbers, and so is text in a file
    without types if all of it reads as numbers. Other text is text if most of its values differ, otherwise a category. Titles are text.
    """
    if is_index_name(name) or (name in _INDEX_COLUMNS and _counts_rows(column)):
        return None, AN_INDEX
    if column.null_count == len(column):
        return None, "it has no value"
    if is_title and is_list(column.type) and pa.types.is_string(column.type.value_type):
        return "text", ""
    if is_list(column.type) or declared == "float_seq":
        return _infer_list(column.type.value_type if is_list(column.type) else pa.float64())
    if is_title and (is_text(column) or is_number(column.type)):
        return "text", ""
    if is_number(column.type) or declared == "float":
        return "numbers", ""
    return _infer_text(column, declared)


def _infer_text(column: pa.ChunkedArray, declared: str) -> tuple[FeatureKind | None, str]:
    if pa.types.is_boolean(column.type):
        return "categories", ""
    if not is_text(column):
        return None, "not text in UTF-8" if pa.types.is_binary(column.type) else "values of this type are neither text nor numbers"
    column = spell(column)
    if declared in (TEXT, JSON_VALUE) and reads_as_numbers(column):
        return "numbers", ""
    if declared == JSON_VALUE and pc.all(pc.starts_with(column, "{")).as_py():
        return None, "objects with too many kinds of keys; write those that matter as columns of their own"
    return ("text" if _distinct_ratio(column) > 0.5 else "categories"), ""


def _infer_list(kind: pa.DataType) -> tuple[FeatureKind | None, str]:
    if kind == WHOLE_JSON:
        return "categories", ""
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "vectors", ""
    if pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "categories", ""
    return None, "lists of values that are neither text nor numbers"


def scalar_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert lists, including lists written as text, to lists of scalars; other columns stay unchanged."""
    if pa.types.is_string(column.type):
        column = parsed if (parsed := parsed_lists(column)) is not None else column
    column = simple_lists(column) if is_list(column.type) else column
    is_bytes = is_list(column.type) and pa.types.is_binary(column.type.value_type)
    return spell(column) if is_bytes else column


def as_kind(column: pa.ChunkedArray, kind: FeatureKind) -> pa.ChunkedArray:
    """Convert a column to the type of its kind: text, lists of text, or numbers; for vectors see `as_vectors`."""
    if kind == "numbers":
        return column if is_list(column.type) else numbers_of(column)
    if pa.types.is_null(column.type):
        return column
    return spell(column)


def as_vectors(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Convert a column to lists of numbers; text is split at blanks, commas, semicolons and bars. An empty list becomes null.

    Raises:
        UserError: a value is not a number.
    """
    if pa.types.is_string(column.type):
        text = pc.utf8_trim(column, characters=_VECTOR_ENDS)
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.list_(pa.string())), pc.split_pattern_regex(text, _VECTOR_SEPARATOR))
    try:
        lists = column.cast(pa.list_(pa.float64())).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"data.item_features.vectors: column '{name}' is not lists of numbers ({error})") from error
    return pa.chunked_array([pc.if_else(pc.equal(pc.list_value_length(lists), 0), pa.scalar(None, lists.type), lists)])


def odd_vector(column: pa.ChunkedArray) -> tuple[int, int, int] | None:
    """Find the first row whose vector length is not the usual one; return the row, its length and the usual length."""
    lengths = pc.list_value_length(column).combine_chunks()
    if len(pc.unique(lengths.drop_null())) < 2:
        return None
    usual = pc.mode(lengths)[0]["mode"].as_py()
    row = pc.index(pc.not_equal(lengths, usual), True).as_py()
    return row, lengths[row].as_py(), usual


def _counts_rows(column: pa.ChunkedArray) -> bool:
    """Return whether a column counts the rows from 0 or 1, as an index does after reset_index."""
    numbers = numbers_of(column).to_numpy(zero_copy_only=False)
    return len(numbers) > 1 and bool(np.array_equal(np.diff(numbers), np.ones(len(numbers) - 1))) and numbers[0] in (0, 1)


def is_missing(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return which values are missing: null, NaN, or a usual word for that in text."""
    if not pa.types.is_string(column.type):
        return column.is_null(nan_is_null=pa.types.is_floating(column.type))
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    return pc.or_(texts.is_null(), pc.is_in(texts, value_set=pa.array(_MISSING_NUMBERS)))


def reads_as_numbers(column: pa.ChunkedArray) -> bool:
    """Return whether all texts parse as numbers, except the usual words for a missing one."""
    values = pc.utf8_lower(pc.utf8_trim_whitespace(column)).filter(pc.invert(is_missing(column)))
    try:
        values.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return len(values) > 0


def _distinct_ratio(column: pa.ChunkedArray) -> float:
    num_values: int = len(column) - column.null_count
    num_distinct: int = pc.count_distinct(column, mode="only_valid").as_py()
    return num_distinct / max(1, num_values)
