"""Raw events to clean ones, as pure functions over Arrow tables that count what they drop; `rules.py` tells every rule."""

import math
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.inputs.formats import INPUT_ORDER
from recsys.data.preparing.normalising import MAX_TEXT_CHARACTERS, cut, fold, valid_text
from recsys.data_config import CleaningConfig
from recsys.errors import UserError
from recsys.schema import DEFAULT_EVENT, EVENT, EVENTS_SCHEMA, ITEM_ID, POSITION, QUERY, TIMESTAMP, USER_ID, VALUE

_LARGEST_TIME = float(2**62)
_NEGATIVE = r"^-\d+(\.\d+)?$"
_ODD = r"[\x00-\x1f\x7f\x{80}-\x{9f}\x{fffd}]"
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
    queries = cast_ids(raw[QUERY], QUERY) if QUERY in raw.column_names else pa.nulls(raw.num_rows, pa.string())
    faults = {
        "null_user": users.is_null(),
        "null_item": items.is_null(),
        "null_time": raw[time_column].is_null(),
        "bad_time": bad_times,
        "null_event": events.is_null(),
        "bad_value": bad_values,
    }
    table = pa.table([users, items, times, events, values, queries, raw[INPUT_ORDER]], schema=EVENTS_SCHEMA)
    return _without(table, faults)


def _without(table: pa.Table, faults: dict[str, pa.ChunkedArray]) -> tuple[pa.Table, Counter[str]]:
    """Drop the rows with a fault, each counted under its first."""
    keep = pa.chunked_array([pa.array(np.ones(table.num_rows, bool))])
    rejected: Counter[str] = Counter()
    for reason, fault in faults.items():
        rejected[reason] = pc.sum(pc.and_(keep, fault)).as_py() or 0
        keep = pc.and_not(keep, fault)
    return table.filter(keep), +rejected


def apply_rules(events: pa.Table, rules: CleaningConfig, has_time: bool) -> tuple[pa.Table, Counter[str]]:
    """Drop the events (EVENTS_SCHEMA) that break a rule about one event alone; times are no matter where they are positions.

    Values are compared in the precision that they are stored in, so that a bound itself is inside.
    """
    faults: dict[str, pa.ChunkedArray] = {}
    low, high = (bound if bound is None else pa.scalar(np.float32(bound), pa.float32()) for bound in (rules.min_value, rules.max_value))
    if low is not None or high is not None:
        below = pc.less(events[VALUE], low) if low is not None else None
        above = pc.greater(events[VALUE], high) if high is not None else None
        faults["outlier_value"] = _either(below, above)
    if has_time:
        faults["early_time"] = pc.less(events[TIMESTAMP], rules.min_time)
        faults["future_time"] = pc.greater(events[TIMESTAMP], rules.max_time)
    if rules.reject_negative_ids:
        faults["negative_id"] = _either(is_negative(events[USER_ID]), is_negative(events[ITEM_ID]))
    return _without(events, faults)


def _either(first: pa.ChunkedArray | None, second: pa.ChunkedArray | None) -> pa.ChunkedArray:
    found = first if second is None else second if first is None else pc.or_kleene(first, second)
    return pc.fill_null(found, False)


def is_negative(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Tell which ids are negative numbers."""
    return pc.match_substring_regex(ids, _NEGATIVE)


def normalise_queries(events: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Normalise what was asked, each distinct text once; count the events whose query is cut."""
    encoded = events[QUERY].combine_chunks().dictionary_encode()
    folded = [fold(text) for text in encoded.dictionary.to_pylist()]
    texts = pa.array([cut(text) or None for text in folded], pa.string())
    is_cut = pa.array([len(text) > MAX_TEXT_CHARACTERS for text in folded], pa.bool_())
    noticed = Counter(query_cut=pc.sum(is_cut.take(encoded.indices)).as_py() or 0)
    return events.set_column(events.column_names.index(QUERY), QUERY, texts.take(encoded.indices)), +noticed


def notice_ids(events: pa.Table) -> Counter[str]:
    """Count the events with odd ids, before these become pseudonyms."""
    odd = [_either(is_negative(events[USER_ID]), is_negative(events[ITEM_ID]))]
    odd.append(_either(*(pc.match_substring_regex(events[name], _ODD) for name in (USER_ID, ITEM_ID))))
    return +Counter({name: pc.sum(rows).as_py() or 0 for name, rows in zip(("negative_id", "odd_id"), odd, strict=True)})


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
        text = pc.utf8_trim_whitespace(valid_text(column.cast(pa.string())))
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


def drop_bots(events: pa.Table, max_per_minute: int | None) -> tuple[pa.Table, int]:
    """Drop all events of users with more than `max_per_minute` in any minute of the clock; tell how many events went."""
    if max_per_minute is None:
        return events, 0
    minutes = pa.array(events[TIMESTAMP].to_numpy() // 60)
    counts = pa.table([events[USER_ID], minutes], [USER_ID, "minute"]).group_by([USER_ID, "minute"], use_threads=False)
    busy = counts.aggregate([([], "count_all")])
    bots = pc.unique(busy.filter(pc.greater(busy["count_all"], max_per_minute))[USER_ID])
    kept = events.filter(pc.invert(pc.is_in(events[USER_ID], value_set=bots)))
    return kept, events.num_rows - kept.num_rows


def notice_order(events: pa.Table) -> Counter[str]:
    """Count events that the input has out of order, and ties, in events sorted by the tie rule."""
    users = events[USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    times, order = events[TIMESTAMP].to_numpy(), events[INPUT_ORDER].to_numpy()
    by_input = np.lexsort((order, users))
    is_same_user = np.diff(users) == 0
    goes_back = np.diff(times[by_input]) < 0
    is_tie = np.diff(times) == 0
    return +Counter(out_of_order=int((goes_back & is_same_user).sum()), equal_time=int((is_tie & is_same_user).sum()))


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
