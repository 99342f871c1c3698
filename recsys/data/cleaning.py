"""Raw events to clean ones, as pure functions over Arrow tables: casts, counted rejects, duplicates, order."""

import math
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.formats import INPUT_ORDER
from recsys.errors import UserError
from recsys.schema import DEFAULT_EVENT, EVENT, EVENTS_SCHEMA, ITEM_ID, POSITION, TIMESTAMP, USER_ID, VALUE

REJECT_REASONS = ("null_user", "null_item", "null_time", "bad_time", "null_event", "bad_value")
"""Why a row is rejected while it is cast; a row with several faults is counted under the first of these."""

_LARGEST_TIME = float(2**62)
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def cast_events(raw: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Cast events to EVENTS_SCHEMA and drop those that cannot be, counted by reason.

    Ids are strings without surrounding blanks, and an empty one is null. Times are seconds: numbers (rounded down),
    Arrow timestamps and dates, or ISO 8601 text (UTC where it names no zone). A value that is not a finite number is
    bad; an absent one is not. Without an event column every event is of the default kind.
    """
    time_column = TIMESTAMP if TIMESTAMP in raw.column_names else POSITION
    users, items = cast_ids(raw[USER_ID], USER_ID), cast_ids(raw[ITEM_ID], ITEM_ID)
    times, bad_times = _cast_times(raw[time_column])
    events = pa.array([DEFAULT_EVENT], pa.string()).take(pa.array([0] * raw.num_rows, pa.int32()))
    if EVENT in raw.column_names:
        events = cast_ids(raw[EVENT], EVENT)
    values, bad_values = pa.nulls(raw.num_rows, pa.float32()), pa.array([False] * raw.num_rows, pa.bool_())
    if VALUE in raw.column_names:
        values, bad_values = _cast_values(raw[VALUE])
    faults = dict(
        zip(
            REJECT_REASONS,
            (users.is_null(), items.is_null(), raw[time_column].is_null(), bad_times, events.is_null(), bad_values),
            strict=True,
        )
    )
    keep = pa.chunked_array([pa.array([True] * raw.num_rows, pa.bool_())])
    rejected: Counter[str] = Counter()
    for reason, fault in faults.items():
        rejected[reason] = pc.sum(pc.and_(keep, fault)).as_py() or 0
        keep = pc.and_not(keep, fault)
    table = pa.table([users, items, times, events, values, raw[INPUT_ORDER]], schema=EVENTS_SCHEMA)
    return table.filter(keep), +rejected


def cast_ids(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Cast ids to strings; whole numbers in a float column, as null-keeping tools write them, lose their `.0`.

    Raises:
        UserError: the column's type cannot be an id, such as a list.
    """
    if pa.types.is_floating(column.type):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            column = pc.if_else(pc.is_nan(column), None, column)
    try:
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{name}': {column.type} cannot be read as text ({error})") from error
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def drop_duplicates(events: pa.Table) -> tuple[pa.Table, int]:
    """Keep the first by input order of events that agree in user, item, time and kind; return them sorted, and how many went.

    The order is that of the tie rule: user, time, input order.
    """
    keys = [USER_ID, ITEM_ID, TIMESTAMP, EVENT]
    firsts = events.group_by(keys, use_threads=False).aggregate([(INPUT_ORDER, "min")])[f"{INPUT_ORDER}_min"]
    kept = events.filter(pc.is_in(events[INPUT_ORDER], value_set=firsts.combine_chunks()))
    order = [(USER_ID, "ascending"), (TIMESTAMP, "ascending"), (INPUT_ORDER, "ascending")]
    return kept.sort_by(order).combine_chunks(), events.num_rows - kept.num_rows


def cast_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast to float64; what is not a number is null."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, pa.scalar(None, pa.string()))
    try:
        return column.cast(pa.float64(), safe=False)
    except pa.ArrowNotImplementedError:
        return pa.chunked_array([pa.nulls(len(column), pa.float64())])


def _cast_values(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    numbers = cast_numbers(column).cast(pa.float32(), safe=False)
    is_good = pc.fill_null(pc.is_finite(numbers), False)
    return numbers, pc.and_not(column.is_valid(), is_good)


def _cast_times(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Cast to whole seconds, and tell which present times are none."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64()), pa.chunked_array([pa.array([False] * len(column), pa.bool_())])
    if pa.types.is_timestamp(column.type):
        numbers = pc.floor_temporal(column, unit="second").cast(pa.timestamp("s", column.type.tz)).cast(pa.int64()).cast(pa.float64())
    elif pa.types.is_string(column.type):
        numbers = pc.floor(pc.coalesce(cast_numbers(column), _parse_iso(column)))
    else:
        numbers = pc.floor(cast_numbers(column))
    in_range = pc.and_(pc.is_finite(numbers), pc.less(pc.abs(numbers), _LARGEST_TIME))
    is_good = pc.fill_null(in_range, False)
    seconds = pc.if_else(is_good, numbers, pa.scalar(None, pa.float64())).cast(pa.int64())
    return seconds, pc.and_not(column.is_valid(), is_good)


def _parse_iso(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Read what is not a number as ISO 8601, each distinct text once."""
    texts = pc.if_else(pc.match_substring_regex(column, _NUMBER), pa.scalar(None, pa.string()), column).combine_chunks()
    encoded = texts.dictionary_encode()
    seconds = pa.array([_iso_seconds(text) for text in encoded.dictionary.to_pylist()], pa.float64(), from_pandas=True)
    return pa.chunked_array([seconds.take(encoded.indices)])


def _iso_seconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
