"""Converts times of any type and unit to whole seconds since 1970."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Integers
from recsys.errors import UserError
from recsys.ingest.sources.scalars import NUMBER, numbers_of, per_second, texts_of
from recsys.schema import LARGEST_SECONDS, read_time

UNIT_LIMITS = {"s": LARGEST_SECONDS, "ms": LARGEST_SECONDS * 1e3, "us": LARGEST_SECONDS * 1e6}
"""Upper limit of numbers of each unit: times of today have 10 digits in seconds, 13 in ms, 16 in us and 19 in ns."""

UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_LARGEST_TIME = float(2**62)
_WHOLE = r"^[+-]?\d{1,18}$"
_LONG_WHOLE = r"^[+-]?\d{19}$"
_LARGEST = str(2**63 - 1)
_DATE_DIGITS = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(([01]\d|2[0-3])[0-5]\d[0-5]\d)?")


def split_times(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return times without a unit as numbers, rounded down, and times with a unit as seconds; both are int64, null elsewhere.

    Dates, timestamps of any zone and unit, and ISO 8601 text have a unit; without a zone they are UTC.
    """
    kind = column.type
    nothing = pa.chunked_array([pa.nulls(len(column), pa.int64())])
    if pa.types.is_binary(kind):
        column = texts_of(column)
        kind = column.type
    if pa.types.is_date(kind):
        return nothing, pc.multiply(column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()), 86_400)
    if pa.types.is_timestamp(kind):
        return nothing, divide(column.cast(pa.int64()), per_second(kind.unit))
    if pa.types.is_string(kind):
        return _text_numbers(column), _parse_iso(column)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return column.cast(pa.int64()), nothing
    if pa.types.is_decimal(kind):
        return _text_numbers(texts_of(column)), nothing
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return nothing, nothing
    return _rounded(numbers_of(column)), nothing


def cast_times(column: pa.ChunkedArray, unit: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Cast times to whole seconds, numbers being in `unit`; also return which present values are not times."""
    if column.type == pa.uint64():  # the largest values fit into int64 only after the division
        column, unit = pc.divide(column, pa.scalar(per_second(unit), pa.uint64())), "s"
    numbers, seconds = split_times(column)
    times = pc.coalesce(divide(numbers, per_second(unit)), seconds)
    return times, pc.and_not(column.is_valid(), times.is_valid())


def divide(numbers: pa.ChunkedArray, divisor: int) -> pa.ChunkedArray:
    """Divide whole numbers, rounding down."""
    if divisor == 1:
        return numbers
    quotients = pc.divide(numbers, pa.scalar(divisor, pa.int64()))  # rounds towards zero
    is_above = pc.less(numbers, pc.multiply(quotients, divisor))
    return pc.if_else(is_above, pc.subtract(quotients, 1), quotients)


def units_of(numbers: Integers) -> Integers:
    """Return the unit of each number by its digits, as an index into UNIT_NAMES; -1 for numbers that are not positive."""
    units = np.digitize(numbers.astype(np.float64), list(UNIT_LIMITS.values()))
    return np.where(numbers > 0, units, -1)


def guess_unit(column: pa.ChunkedArray) -> str:
    """Return the unit of the first positive number; empty if there is none.

    Raises:
        UserError: the numbers are dates written without separators, such as 20240131.
    """
    numbers = split_times(column)[0].drop_null().to_numpy()
    _refuse_dates(numbers)
    positive = numbers[numbers > 0]
    if not len(positive):
        return ""
    return list(UNIT_NAMES)[int(units_of(positive[:1])[0])]


def _refuse_dates(numbers: Integers) -> None:
    positive = numbers[numbers > 0]
    if len(positive) and all(_DATE_DIGITS.fullmatch(str(number)) for number in positive[:1000].tolist()):
        raise UserError(
            f"times such as {positive[0]} read like dates without separators; write them as 2024-01-31, or set data.time_unit "
            "if they are numbers of a unit"
        )


def find_other_unit(column: pa.ChunkedArray, unit: str) -> tuple[int, int] | None:
    """Return the place and the value of the first number whose digits show another unit; None if there is none.

    Raises:
        UserError: as `guess_unit`.
    """
    numbers = split_times(column)[0]
    known = pc.fill_null(numbers, 0).to_numpy()
    _refuse_dates(known)
    units = units_of(known)
    others = np.flatnonzero((units >= 0) & (units != list(UNIT_NAMES).index(unit)))
    return (int(others[0]), int(known[others[0]])) if len(others) else None


def _parse_iso(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse texts that are not numbers as ISO 8601, each distinct text once."""
    texts = pc.utf8_trim_whitespace(column)
    others = pc.if_else(pc.match_substring_regex(texts, NUMBER), pa.scalar(None, pa.string()), texts).combine_chunks()
    encoded = others.dictionary_encode()
    times = [read_time(text) for text in encoded.dictionary.to_pylist()]
    seconds = pa.array([None if math.isnan(time) else math.floor(time) for time in times], pa.int64())
    return pa.chunked_array([seconds.take(encoded.indices)])


def _text_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse whole numbers exactly and round others down; text that is not a number, or out of range, is null."""
    text = pc.utf8_ltrim(pc.utf8_trim_whitespace(column), characters="+")  # Arrow's cast does not accept a plus sign
    null = pa.scalar(None, pa.string())
    is_long = pc.and_(pc.match_substring_regex(text, _LONG_WHOLE), pc.less_equal(pc.utf8_ltrim(text, characters="-"), _LARGEST))
    whole = pc.if_else(pc.or_(pc.match_substring_regex(text, _WHOLE), is_long), text, null).cast(pa.int64())
    return pc.coalesce(whole, _rounded(numbers_of(pc.if_else(whole.is_valid(), null, text))))


def _rounded(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    floors = pc.floor(numbers)
    is_good = pc.fill_null(pc.and_(pc.is_finite(floors), pc.less(pc.abs(floors), _LARGEST_TIME)), False)
    return pc.if_else(is_good, floors, pa.scalar(None, pa.float64())).cast(pa.int64())
