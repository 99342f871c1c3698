"""Rejected rows: counts by rule and the first examples of each, with file, row and value. The rules are in `rules.py`."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.manifest import Example
from recsys.ingest.clean.rules import REJECTED, REMEDIES
from recsys.ingest.sources.formats import FILE_SHIFT, INPUT_ORDER
from recsys.schema import ITEM_ID, USER_ID
from recsys.store import ObjectInfo

NUM_EXAMPLES = 3
_SHOWN_CHARACTERS = 60
_HIDDEN = "(hidden by data.pseudonym_key_env)"
Found = tuple[int, str]
"""A row's `input_order` and the value that it was dropped for."""


class Rejects(Counter[str]):
    """Rows dropped by rule, with the first `NUM_EXAMPLES` of each by their order in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, list[Found]] = {}

    def add(self, rule: str, is_dropped: pa.ChunkedArray, order: pa.ChunkedArray, values: pa.ChunkedArray) -> None:
        """Count the rows of a table that break a rule (a mask), and keep the first as examples."""
        places = np.flatnonzero(is_dropped.to_numpy(zero_copy_only=False))
        if len(places):
            self[rule] += len(places)
            self._keep(rule, [(order[place].as_py(), _shown(values[place].as_py())) for place in places[:NUM_EXAMPLES].tolist()])

    def add_missing(self, rule: str, before: pa.Table, after: pa.Table) -> None:
        """Count the events of `before` that are not in `after`, and keep the first as examples, by user and item."""
        if before.num_rows > after.num_rows:
            is_dropped = pc.invert(pc.is_in(before[INPUT_ORDER], value_set=after[INPUT_ORDER].combine_chunks()))
            dropped = before.filter(is_dropped).sort_by(INPUT_ORDER).slice(0, NUM_EXAMPLES)
            self[rule] += before.num_rows - after.num_rows
            rows = zip(*(dropped[name].to_pylist() for name in (INPUT_ORDER, USER_ID, ITEM_ID)), strict=True)
            self._keep(rule, [(order, f"user {_shown(user)}, item {_shown(item)}") for order, user, item in rows])

    def merge(self, other: "Rejects") -> None:
        """Add another's rows."""
        self.update(other)
        for rule, found in other.examples.items():
            self._keep(rule, found)

    def hide(self, rules: Iterable[str]) -> None:
        """Hide the values in some rules' examples, since they may be user ids that are to be pseudonymised."""
        for rule in rules:
            self.examples[rule] = [(order, _HIDDEN) for order, _ in self.examples.get(rule, [])]

    def outcome(self) -> dict[str, Any]:
        """Return the counts and examples as the JSON of a task's outcome."""
        return {"rejected": dict(self), "examples": self.examples}

    @classmethod
    def of_outcomes(cls, outcomes: Iterable[Mapping[str, Any]]) -> "Rejects":
        """Merge the outcomes of tasks."""
        joined = cls()
        for outcome in outcomes:
            part = cls()
            part.update(outcome.get("rejected", {}))
            part.examples = {rule: [(order, value) for order, value in found] for rule, found in outcome.get("examples", {}).items()}
            joined.merge(part)
        return joined

    def _keep(self, rule: str, found: Iterable[Found]) -> None:
        self.examples[rule] = heapq.nsmallest(NUM_EXAMPLES, [*self.examples.get(rule, []), *found])

    def named(self, files: Sequence[ObjectInfo]) -> dict[str, tuple[Example, ...]]:
        """Return the examples with the names of their files."""

        def name(order: int, value: str) -> Example:
            return Example(file=files[order >> FILE_SHIFT].uri, row=order % (1 << FILE_SHIFT) + 1, value=value)

        return {rule: tuple(name(*each) for each in found) for rule, found in sorted(self.examples.items()) if found}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value)
    return f"'{text}'" if len(text) <= _SHOWN_CHARACTERS else f"'{text[:_SHOWN_CHARACTERS]}...' ({len(text)} characters)"


def tell(rule: str, count: int, examples: Sequence[Example]) -> str:
    """Describe in one sentence what a rule rejected, and where."""
    places = "; ".join(f"{each.file} row {each.row}: {each.value}" for each in examples)
    return f"{count} {'row' if count == 1 else 'rows'}: {REJECTED[rule]} ({rule})" + (f", such as {places}" if places else "")


def remedy(counts: Mapping[str, int]) -> str:
    """Return the setting that would accept the rows if a single rule rejected them all; otherwise an empty string."""
    reasons = [rule for rule, count in counts.items() if count]
    return f"; {REMEDIES[reasons[0]]}" if len(reasons) == 1 and reasons[0] in REMEDIES else ""
