"""Slates: rows that show a user several items at once become an exposure per item and an event for each item that was taken.

MIND's `behaviors.tsv` writes a slate as `N1-0 N2-1`, where 1 means clicked, and repeats what the user clicked before in each row.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import UserError
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER
from recsys.ingest.sources.scalars import is_list, texts_of
from recsys.schema import DISPLAY_POSITION, EVENT, IMPRESSION_ID, ITEM_ID, TIMESTAMP, USER_ID

SLATE, FLAGS, HISTORY = "slate", "flags", "history"
SHOWN, TAKEN = "impression", "click"
ROWS_PER_SLATE = 4096
"""Events of one row are numbered within its `input_order`."""

_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"
Event = tuple[str | None, str | None, Any, str, str, int | None, int]


def expand_slates(table: pa.Table, time_column: str) -> pa.Table:
    """Return a table's slates as events.

    The table has `user_id`, the time column and `slate`; it may have `impression_id`, `flags` (which items were taken; without it, items
    end with -0 or -1) and `history` (items taken before, oldest first). Lists are Arrow lists, or texts separated by blanks.

    Raises:
        UserError: a row has another number of flags than of items, or too many items.
    """
    times = table[time_column]
    if pa.types.is_string(times.type) and time_column == TIMESTAMP:
        parsed = pc.strptime(times, format=_MIND_TIME, unit="s", error_is_null=True)
        times = parsed if parsed.null_count < len(parsed) else times
    rows = zip(
        texts_of(table[USER_ID], "backslashreplace").to_pylist(),
        times.to_pylist(),
        _cells(table, IMPRESSION_ID),
        _lists(table, SLATE),
        _lists(table, FLAGS),
        _lists(table, HISTORY),
        table[INPUT_ORDER].to_pylist(),
        strict=True,
    )
    events = [event for row in rows for event in _events(*row)]
    columns = list(zip(*events, strict=True)) if events else [()] * 7
    names = (USER_ID, ITEM_ID, time_column, EVENT, IMPRESSION_ID, DISPLAY_POSITION, INPUT_ORDER)
    types = (pa.string(), pa.string(), times.type, pa.string(), pa.string(), pa.int32(), pa.int64())
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, types, strict=True)], list(names))


def _cells(table: pa.Table, name: str) -> list[str | None]:
    return texts_of(table[name], "backslashreplace").to_pylist() if name in table.column_names else [None] * table.num_rows


def _lists(table: pa.Table, name: str) -> list[list[str]]:
    """Return the lists of a column as texts; empty if the column is absent."""
    if name not in table.column_names:
        return [[] for _ in range(table.num_rows)]
    column = table[name]
    if is_list(column.type):
        return [[str(int(value)) if isinstance(value, bool) else str(value) for value in values or []] for values in column.to_pylist()]
    return [(text or "").split() for text in texts_of(column, "backslashreplace").to_pylist()]


def _events(
    user: str | None, time: Any, impression: str | None, slate: list[str], flags: list[str], history: list[str], order: int
) -> Iterator[Event]:
    row = order % (1 << FILE_SHIFT) + 1
    if flags and len(flags) != len(slate):
        raise UserError(f"row {row}: has {len(slate)} items and {len(flags)} flags; a slate needs a flag for each item")
    if 2 * len(slate) + len(history) > ROWS_PER_SLATE:
        raise UserError(f"row {row}: has {len(slate)} items and a history of {len(history)}; at most {ROWS_PER_SLATE} events fit in a row")
    first = (order >> FILE_SHIFT << FILE_SHIFT) + (row - 1) * ROWS_PER_SLATE
    name = impression or str(order)
    number = first
    for place, item in enumerate(history, start=1):  # long before all slates, in order, and at the same time in every row of the user
        moment = datetime.fromtimestamp(place, UTC).replace(tzinfo=None) if isinstance(time, datetime) else type(time)(place)
        yield user, item, moment, TAKEN, "", None, number
        number += 1
    for place, (item, flag) in enumerate(zip(*_split(slate, flags), strict=True), start=1):
        yield user, item, time, SHOWN, name, place, number
        number += 1
        if flag == "1":
            yield user, item, time, TAKEN, name, None, number
            number += 1


def _split(slate: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Return the items and their flags; items without a flag were not taken."""
    if flags:
        return slate, flags
    parts = [entry.rpartition("-") for entry in slate]
    pairs = [(item, flag) if flag in ("0", "1") and item else (entry, "0") for entry, (item, _, flag) in zip(slate, parts, strict=True)]
    return [item for item, _ in pairs], [flag for _, flag in pairs]
