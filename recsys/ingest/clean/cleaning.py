"""Cleans text and events; the event functions are pure, take Arrow tables and count the rows that they drop."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.config.data import CleaningConfig, DataConfig
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.clean.times import cast_times
from recsys.ingest.sources.formats import INPUT_ORDER
from recsys.ingest.sources.scalars import ids_of, may_be_rounded, numbers_of
from recsys.schema import (
    DEFAULT_EVENT,
    DISPLAY_POSITION,
    EVENT,
    IMPRESSION_ID,
    ITEM_ID,
    LABEL_PREFIX,
    MAX_ID_CHARACTERS,
    POSITION,
    QUERY,
    SPLIT,
    TIMESTAMP,
    USER_ID,
    VALUE,
    events_schema,
    order_event_kinds,
)

Values: TypeAlias = pa.ChunkedArray | Callable[[], pa.ChunkedArray]

MAX_TEXT_CHARACTERS = 2000
"""Longer text is cut; no backbone reads that much text of one item."""

UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
"""Control characters except whitespace, lone surrogates, and U+FFFD, which readers insert for broken text."""

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "tr", "0"), 0),
    **dict.fromkeys(("validation", "valid", "val", "dev", "1"), 1),
    **dict.fromkeys(("test", "te", "2"), 2),
}
"""The part that each value of the split column stands for, in lower case."""

_NEGATIVE = r"^-\d+(\.\d+)?$"
_ODD = r"[\x00-\x1f\x7f\x{80}-\x{9f}\x{fffd}]|\\x[89a-f][0-9a-f]"
_SPREADSHEET = r"^\d(\.\d+)?[eE]\+\d+$"


def cast_events(raw: pa.Table, unit: str = "s", optional: Sequence[str] = ()) -> tuple[pa.Table, Rejects]:
    """Cast events to `events_schema(optional)`; drop events that cannot be cast, and count them by reason.

    Ids are spelled as by `recsys.schema.normalize_id`; an empty id is null. Times become seconds, from numbers of `unit` (rounded down),
    Arrow timestamps and dates, or ISO 8601 text (UTC if it has no zone). A value that is present but not a finite number is bad.
    Without an event column every event has the default kind.
    """
    time_column = TIMESTAMP if TIMESTAMP in raw.column_names else POSITION
    users, items = ids_of(raw[USER_ID], USER_ID), ids_of(raw[ITEM_ID], ITEM_ID)
    times, bad_times = cast_times(raw[time_column], unit if time_column == TIMESTAMP else "s")
    events = pa.chunked_array([pa.array([DEFAULT_EVENT], pa.string()).take(pa.array([0] * raw.num_rows, pa.int32()))])
    if EVENT in raw.column_names:
        events = ids_of(raw[EVENT], EVENT)
    values, bad_values = pa.nulls(raw.num_rows, pa.float32()), pa.chunked_array([pa.array([False] * raw.num_rows, pa.bool_())])
    if VALUE in raw.column_names:
        values, bad_values = _cast_values(raw[VALUE])
    queries = ids_of(raw[QUERY], QUERY) if QUERY in raw.column_names else pa.nulls(raw.num_rows, pa.string())
    longest = [pc.if_else(is_long(ids), ids, pa.scalar(None, pa.string())) for ids in (users, items, events)]
    too_long = pc.coalesce(*longest)
    faults = {
        "null_user": (users.is_null(), raw[USER_ID]),
        "null_item": (items.is_null(), raw[ITEM_ID]),
        "long_id": (too_long.is_valid(), too_long),
        "null_time": (raw[time_column].is_null(), raw[time_column]),
        "bad_time": (bad_times, raw[time_column]),
        "null_event": (events.is_null(), raw[EVENT] if EVENT in raw.column_names else events),
        "bad_value": (bad_values, raw[VALUE] if VALUE in raw.column_names else values),
    }
    extra: list[pa.ChunkedArray] = []
    for name in optional:
        column, is_bad = _cast_optional(raw, name)
        extra.append(column)
        if is_bad is not None:
            faults[f"bad_{name.partition(':')[0]}"] = is_bad, raw[name]
    table = pa.table([users, items, times, events, values, queries, raw[INPUT_ORDER], *extra], schema=events_schema(optional))
    return _without(table, faults)


def _cast_optional(raw: pa.Table, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Cast an optional column (see `recsys.schema.OPTIONAL_TYPES`); also return which rows must be dropped, if any may."""
    kind = events_schema([name]).field(name).type
    if name not in raw.column_names:
        return pa.chunked_array([pa.nulls(raw.num_rows, kind)]), None
    if pa.types.is_string(kind):
        return ids_of(raw[name], name), None
    if name == SPLIT:
        parts = pc.index_in(pc.utf8_lower(ids_of(raw[name], name)), value_set=pa.array(list(SPLIT_NAMES)))
        numbers = pa.array(list(SPLIT_NAMES.values()), pa.int8())
        return pa.chunked_array([numbers.take(parts.combine_chunks())]), parts.is_null()
    numbers = numbers_of(raw[name])
    if name == DISPLAY_POSITION:
        return numbers.cast(kind, safe=False), None
    is_label = pc.fill_null(pc.or_(pc.equal(numbers, 0), pc.equal(numbers, 1)), False)
    return pc.if_else(is_label, numbers, pa.scalar(None, numbers.type)).cast(kind, safe=False), pc.and_not(raw[name].is_valid(), is_label)


def is_long(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return which ids have more than MAX_ID_CHARACTERS."""
    return pc.fill_null(pc.greater(pc.utf8_length(ids), MAX_ID_CHARACTERS), False)


def _without(table: pa.Table, faults: Mapping[str, tuple[pa.ChunkedArray, Values]]) -> tuple[pa.Table, Rejects]:
    """Drop rows with a fault, each counted under its first one; a fault is a mask, and the values to show or a function for them."""
    keep = pa.chunked_array([pa.array(np.ones(table.num_rows, bool))])
    rejects = Rejects()
    for reason, (fault, values) in faults.items():
        is_dropped = pc.and_(keep, fault)
        if pc.any(is_dropped).as_py():
            rejects.add(reason, is_dropped, table[INPUT_ORDER], values() if callable(values) else values)
        keep = pc.and_not(keep, fault)
    return table.filter(keep), rejects


def apply_rules(events: pa.Table, rules: CleaningConfig, has_time: bool, raw: pa.Table | None = None) -> tuple[pa.Table, Rejects]:
    """Drop events (EVENTS_SCHEMA) that break a rule about a single event; rules about time do not apply to positions.

    Values are compared in their stored precision, so a value equal to a bound is kept. Examples show the values of `raw`.
    """

    def shown(name: str) -> pa.ChunkedArray:
        if raw is None or name not in raw.column_names:
            return events[name]
        return raw[name].filter(pc.is_in(raw[INPUT_ORDER], value_set=events[INPUT_ORDER].combine_chunks()))

    faults: dict[str, tuple[pa.ChunkedArray, Values]] = {}
    low, high = (bound if bound is None else pa.scalar(np.float32(bound), pa.float32()) for bound in (rules.min_value, rules.max_value))
    if low is not None or high is not None:
        below = pc.less(events[VALUE], low) if low is not None else None
        above = pc.greater(events[VALUE], high) if high is not None else None
        faults["outlier_value"] = _either(below, above), partial(shown, VALUE)
    if has_time:
        faults["early_time"] = pc.less(events[TIMESTAMP], rules.min_time), partial(shown, TIMESTAMP)
        faults["future_time"] = pc.greater(events[TIMESTAMP], rules.max_time), partial(shown, TIMESTAMP)
    if rules.reject_negative_ids:
        of_user, of_item = is_negative(events[USER_ID]), is_negative(events[ITEM_ID])
        faults["negative_id"] = _either(of_user, of_item), partial(pc.if_else, of_user, events[USER_ID], events[ITEM_ID])
    return _without(events, faults)


def _either(first: pa.ChunkedArray | None, second: pa.ChunkedArray | None) -> pa.ChunkedArray:
    found = first if second is None else second if first is None else pc.or_kleene(first, second)
    return pc.fill_null(found, False)


def is_negative(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return which ids are negative numbers."""
    return pc.match_substring_regex(ids, _NEGATIVE)


def normalize_text(text: str) -> str:
    """Remove control characters and lone surrogates, fold whitespace, cut at MAX_TEXT_CHARACTERS."""
    return cut(fold(text))


def fold(text: str) -> str:
    """Remove control characters and lone surrogates, and collapse whitespace to single blanks."""
    return " ".join(UNPRINTABLE.sub("", text).split())


def cut(text: str) -> str:
    """Cut text to at most MAX_TEXT_CHARACTERS."""
    return text[:MAX_TEXT_CHARACTERS].rstrip()


def normalize_queries(events: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Normalize the queries, each distinct text once; count the events whose query is cut."""
    encoded = events[QUERY].combine_chunks().dictionary_encode()
    folded = [fold(text) for text in encoded.dictionary.to_pylist()]
    texts = pa.array([cut(text) or None for text in folded], pa.string())
    is_cut = pa.array([len(text) > MAX_TEXT_CHARACTERS for text in folded], pa.bool_())
    noticed = Counter(query_cut=pc.sum(is_cut.take(encoded.indices)).as_py() or 0)
    return events.set_column(events.column_names.index(QUERY), QUERY, texts.take(encoded.indices)), +noticed


def notice_ids(events: pa.Table) -> Counter[str]:
    """Count the events with odd ids; call it before ids become pseudonyms."""
    odd = [_either(is_negative(events[USER_ID]), is_negative(events[ITEM_ID]))]
    odd.append(_either(*(pc.match_substring_regex(events[name], _ODD) for name in (USER_ID, ITEM_ID))))
    return +Counter({name: pc.sum(rows).as_py() or 0 for name, rows in zip(("negative_id", "odd_id"), odd, strict=True)})


def notice_rounded(raw: pa.Table) -> Counter[str]:
    """Count the raw events with an id that may have lost digits upstream."""
    found = []
    for name in (USER_ID, ITEM_ID):
        is_text = pa.types.is_string(raw[name].type)
        found.append(pc.fill_null(pc.match_substring_regex(raw[name], _SPREADSHEET), False) if is_text else may_be_rounded(raw[name]))
    return +Counter(rounded_id=pc.sum(pc.or_(*found)).as_py() or 0)


def sort_and_deduplicate(events: pa.Table) -> tuple[pa.Table, int]:
    """Keep the first, by input order, of events that agree in user, item, time and kind; also return the number dropped.

    The result is sorted by the tie rule: user, time, input order.
    """
    keys = [
        USER_ID,
        ITEM_ID,
        TIMESTAMP,
        EVENT,
        *(name for name in events.column_names if name == IMPRESSION_ID or name.startswith(LABEL_PREFIX)),
    ]
    firsts = events.group_by(keys, use_threads=False).aggregate([(INPUT_ORDER, "min")])[f"{INPUT_ORDER}_min"]
    kept = events.filter(pc.is_in(events[INPUT_ORDER], value_set=firsts.combine_chunks()))
    order = [(USER_ID, "ascending"), (TIMESTAMP, "ascending"), (INPUT_ORDER, "ascending")]
    return kept.sort_by(order).combine_chunks(), events.num_rows - kept.num_rows


def drop_bots(events: pa.Table, max_per_minute: int | None) -> tuple[pa.Table, int]:
    """Drop all events of users with more than `max_per_minute` in any clock minute; also return the number dropped."""
    if max_per_minute is None:
        return events, 0
    minutes = pa.array(events[TIMESTAMP].to_numpy() // 60)
    counts = pa.table([events[USER_ID], minutes], [USER_ID, "minute"]).group_by([USER_ID, "minute"], use_threads=False)
    busy = counts.aggregate([([], "count_all")])
    bots = pc.unique(busy.filter(pc.greater(busy["count_all"], max_per_minute))[USER_ID])
    kept = events.filter(pc.invert(pc.is_in(events[USER_ID], value_set=bots)))
    return kept, events.num_rows - kept.num_rows


def drop_ignored(events: pa.Table, data: DataConfig) -> tuple[pa.Table, Rejects]:
    """Drop the events of ignored kinds."""
    kinds = pc.unique(events[EVENT]).to_pylist()
    ignored = pa.array([kind for kind in kinds if data.kind(kind).role == "ignored"], pa.string())
    return (
        _without(events, {"ignored_kind": (pc.is_in(events[EVENT], value_set=ignored), events[EVENT])})
        if len(ignored)
        else (events, Rejects())
    )


def collapse_chains(events: pa.Table, data: DataConfig) -> pa.Table:
    """Keep the strongest event, the last of equals, of each chain: events of a user on one item at most `data.collapse_seconds` apart.

    Events out of the history, such as exposures, and those that name their impression are kept. `events` are sorted by the tie rule.
    """
    if data.collapse_seconds is None:
        return events
    users, items, kinds = (events[name].combine_chunks().dictionary_encode() for name in (USER_ID, ITEM_ID, EVENT))
    names = kinds.dictionary.to_pylist()
    ordered = order_event_kinds(set(names), data.event_kinds, {name: data.kind(name).role for name in names})
    ranks = {name: rank for rank, name in enumerate(ordered)}
    strengths = np.array([ranks[name] for name in names], np.int64)[kinds.indices.to_numpy()]
    in_history = np.array([data.kind(name).in_history for name in names], bool)[kinds.indices.to_numpy()]
    if IMPRESSION_ID in events.column_names:
        in_history &= events[IMPRESSION_ID].is_null().to_numpy()
    times, user, item = events[TIMESTAMP].to_numpy(), users.indices.to_numpy(), items.indices.to_numpy()
    rows = np.flatnonzero(in_history)
    rows = rows[np.lexsort((rows, item[rows], user[rows]))]  # each user's events on an item together, in order
    starts = np.flatnonzero(
        (np.diff(user[rows], prepend=-1) != 0)
        | (np.diff(item[rows], prepend=-1) != 0)
        | (np.diff(times[rows], prepend=0) > data.collapse_seconds)
    )
    chains = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    best_last = np.lexsort((rows, strengths[rows], chains))
    kept = rows[best_last[np.append(starts, len(rows))[1:] - 1]]
    return events.take(pa.array(np.sort(np.append(kept, np.flatnonzero(~in_history)))))


def notice_order(events: pa.Table) -> Counter[str]:
    """Count events that are out of order in the input, and ties; `events` are sorted by the tie rule."""
    users = events[USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    times, order = events[TIMESTAMP].to_numpy(), events[INPUT_ORDER].to_numpy()
    by_input = np.lexsort((order, users))
    is_same_user = np.diff(users) == 0
    goes_back = np.diff(times[by_input]) < 0
    is_tie = np.diff(times) == 0
    return +Counter(out_of_order=int((goes_back & is_same_user).sum()), equal_time=int((is_tie & is_same_user).sum()))


def _cast_values(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    numbers = numbers_of(column).cast(pa.float32(), safe=False)
    is_good = pc.fill_null(pc.is_finite(numbers), False)
    return numbers, pc.and_not(column.is_valid(), is_good)
