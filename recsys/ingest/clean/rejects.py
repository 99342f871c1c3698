"""Rejected rows: the text of each rule, counts by rule, and the first examples of each with file, row and value."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.manifest import Example
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER
from recsys.schema import ITEM_ID, MAX_ID_CHARACTERS, USER_ID
from recsys.store import ObjectInfo

REJECTED = {
    "null_user": "the user id is missing or blank",
    "null_item": "the item id is missing or blank",
    "null_time": "the time or position is missing",
    "bad_time": "the time or position cannot be read, or is outside any plausible range",
    "long_id": f"the user id, item id or event kind has more than {MAX_ID_CHARACTERS} characters",
    "null_event": "the event kind is missing or blank in a table that has kinds",
    "bad_value": "the value is present but is not a finite number",
    "bad_label": "a label is neither 0 nor 1",
    "bad_split": "the part of the data is none of train, validation and test",
    "outlier_value": "the value is outside data.cleaning.min_value and max_value",
    "early_time": "the time is before data.cleaning.min_time",
    "future_time": "the time is after data.cleaning.max_time",
    "negative_id": "the user or item id is a negative number, and data.cleaning.reject_negative_ids is true",
    "ignored_kind": "the event's kind has data.kinds.NAME.role = ignored",
    "known": "an appended event that the dataset already has: the same user, item, time and kind",
    "duplicate": "an earlier row has the same user, item, time and kind",
    "bot": "the user has more than data.cleaning.max_events_per_minute events in one clock minute; all events of the user are dropped",
    "collapsed": "another event of the user on the item, at least as strong, is within data.collapse_seconds",
    "k_core_item": "the item has fewer than data.k_core interactions",
    "k_core_user": "the user has fewer than data.k_core interactions",
    "withheld": "a training interaction with an item that data.withheld_items keeps out of training",
    "catalogue_long_id": f"a catalogue row whose id has more than {MAX_ID_CHARACTERS} characters",
    "catalogue_null_id": "a catalogue row without an item id",
    "catalogue_negative_id": "a catalogue row whose id is a negative number, and data.cleaning.reject_negative_ids is true",
    "catalogue_duplicate": "a catalogue row whose item has an earlier one",
    "user_null_id": "a row of the users table without a user id",
    "user_long_id": f"a row of the users table whose id has more than {MAX_ID_CHARACTERS} characters",
    "user_duplicate": "a row of the users table whose user has an earlier one",
}
"""Rules that drop rows, in the order in which they apply; a row is counted under the first rule that it breaks. Rules about time
do not apply to positions."""

NOTICED = {
    "negative_id": "events whose user or item id is a negative number, as hashes to signed numbers are; they are ids like any other",
    "odd_id": "events whose user or item id holds control characters, or broken text, which is written as \\xNN",
    "rounded_id": "events whose user or item id may have lost digits before: a float too large to be exact, or a spreadsheet's 4.0E+12",
    "out_of_order": "events that directly follow a later event of the same user in the input; they are sorted",
    "equal_time": "events at the same time as the same user's previous event; the order of the input decides",
    "late": "appended events that are older than the newest known event of their user; they are placed after the known ones",
    "withheld_item": "items that data.withheld_items keeps out of training, so that validation and test have cold ones",
    "query_cut": "events whose query is cut at 2000 characters",
    "unknown_item": "items that events name and the catalogue does not list; they have no text and no features",
    "text_cut": "items whose text is cut at 2000 characters",
    "text_unprintable": "items whose text loses control characters or broken text, such as lone surrogates",
    "category_changed": "category entries that lose control characters or broken text, or are cut at 2000 characters",
}
"""Oddities that are counted; the rows are kept."""

REMEDIES = {
    "null_user": "data.columns.user_id names the column of user ids",
    "null_item": "data.columns.item_id names the column of item ids",
    "null_time": "data.columns.timestamp or data.columns.position names the column that orders events",
    "bad_time": "write times as 2024-01-31T12:00:00Z or as numbers, or name another column by data.columns.timestamp",
    "null_event": "data.columns.event names the column of event kinds; data.columns.event='' reads none",
    "bad_value": "data.columns.value names the column of values; data.columns.value='' reads none",
    "bad_label": "data.columns.labels names columns of 0 and 1",
    "bad_split": "data.columns.split names a column of train, validation and test",
    "outlier_value": "data.cleaning.min_value and data.cleaning.max_value say which values are accepted",
    "early_time": "data.time_unit says what times are counted in, data.cleaning.min_time the earliest that is accepted",
    "future_time": "data.time_unit says what times are counted in, data.cleaning.max_time the latest that is accepted",
    "negative_id": "data.cleaning.reject_negative_ids=false accepts them",
    "bot": "a higher data.cleaning.max_events_per_minute accepts them",
    "ignored_kind": "data.kinds.NAME.role says what each kind means",
    "k_core_item": "a lower data.k_core accepts them",
    "k_core_user": "a lower data.k_core accepts them",
    "withheld": "a lower data.withheld_items leaves more items to train on",
}
"""The setting that accepts the rows that a rule drops; shown if the rule dropped all rows."""

NUM_EXAMPLES = 3
_SHOWN_CHARACTERS = 60
_HIDDEN = "(hidden by data.pseudonym_key_env)"
Found = tuple[int, str]
"""A row's `input_order` and the value that it was dropped for."""


class Counted(Protocol):
    """A task's outcome with rejected rows by rule, and examples of each."""

    @property
    def rejected(self) -> Mapping[str, int]:
        """Rows by rule."""

    @property
    def examples(self) -> dict[str, list[Found]]:
        """The first rows of each rule."""


class Rejects(Counter[str]):
    """Rows dropped by rule, with the first `NUM_EXAMPLES` of each by their order in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, list[Found]] = {}

    def add(self, rule: str, is_dropped: pa.ChunkedArray, order: pa.ChunkedArray, values: pa.ChunkedArray) -> None:
        """Count the rows of a table that break a rule (a mask), and store the first as examples."""
        places = np.flatnonzero(is_dropped.to_numpy(zero_copy_only=False))
        if len(places):
            self[rule] += len(places)
            self._keep(rule, [(order[place].as_py(), _shown(values[place].as_py())) for place in places[:NUM_EXAMPLES].tolist()])

    def add_missing(self, rule: str, before: pa.Table, after: pa.Table) -> None:
        """Count the events of `before` that are not in `after`; examples show user and item."""
        if before.num_rows > after.num_rows:
            is_dropped = pc.invert(pc.is_in(before[INPUT_ORDER], value_set=after[INPUT_ORDER].combine_chunks()))
            dropped = before.filter(is_dropped).sort_by(INPUT_ORDER).slice(0, NUM_EXAMPLES)
            self[rule] += before.num_rows - after.num_rows
            rows = zip(*(dropped[name].to_pylist() for name in (INPUT_ORDER, USER_ID, ITEM_ID)), strict=True)
            self._keep(rule, [(order, f"user {_shown(user)}, item {_shown(item)}") for order, user, item in rows])

    def merge(self, other: "Rejects") -> None:
        """Add the counts and examples of `other`."""
        self.update(other)
        for rule, found in other.examples.items():
            self._keep(rule, found)

    def hide(self, rules: Iterable[str]) -> None:
        """Mask the values in the examples of some rules, since they may be user ids before pseudonymization."""
        for rule in rules:
            self.examples[rule] = [(order, _HIDDEN) for order, _ in self.examples.get(rule, [])]

    @classmethod
    def of_outcomes(cls, outcomes: Iterable[Counted]) -> "Rejects":
        """Merge the rejected rows of task outcomes."""
        joined = cls()
        for outcome in outcomes:
            part = cls()
            part.update(outcome.rejected)
            part.examples = outcome.examples
            joined.merge(part)
        return joined

    def _keep(self, rule: str, found: Iterable[Found]) -> None:
        self.examples[rule] = heapq.nsmallest(NUM_EXAMPLES, [*self.examples.get(rule, []), *found])

    def named(self, files: Sequence[ObjectInfo]) -> dict[str, tuple[Example, ...]]:
        """Return the examples with file names and row numbers."""

        def name(order: int, value: str) -> Example:
            return Example(file=files[order >> FILE_SHIFT].uri, row=order % (1 << FILE_SHIFT) + 1, value=value)

        return {rule: tuple(name(*each) for each in found) for rule, found in sorted(self.examples.items()) if found}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value)
    return f"'{text}'" if len(text) <= _SHOWN_CHARACTERS else f"'{text[:_SHOWN_CHARACTERS]}...' ({len(text)} characters)"


def tell(rule: str, count: int, examples: Sequence[Example]) -> str:
    """Return one sentence on the rows that a rule rejected, with examples."""
    places = "; ".join(f"{each.file} row {each.row}: {each.value}" for each in examples)
    return f"{count} {'row' if count == 1 else 'rows'}: {REJECTED[rule]} ({rule})" + (f", such as {places}" if places else "")


def remedy(counts: Mapping[str, int]) -> str:
    """Return the setting that would accept the rows if a single rule rejected them all; otherwise an empty string."""
    reasons = [rule for rule, count in counts.items() if count]
    return f"; {REMEDIES[reasons[0]]}" if len(reasons) == 1 and reasons[0] in REMEDIES else ""
