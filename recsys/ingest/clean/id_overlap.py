"""The share of ids that two tables have in common, and the warning if it is low."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

_NUM_EXAMPLES = 3
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Overlap:
    """Ids of the events and of the table that describes them: counts, counts missing on the other side, and examples."""

    num_events: int = 0
    num_listed: int = 0
    num_undescribed: int = 0
    num_unused: int = 0
    undescribed: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, of_events: pa.Array, listed: pa.Array) -> "Overlap":
        """Compare the distinct ids of both sides."""
        undescribed, unused = _missing(of_events, listed), _missing(listed, of_events)
        shared = of_events.filter(pc.is_in(of_events, value_set=listed))
        examples = (ids.slice(0, _NUM_EXAMPLES).to_pylist() for ids in (undescribed, unused, shared))
        return cls(len(of_events), len(listed), len(undescribed), len(unused), *examples)

    @classmethod
    def join(cls, parts: Iterable["Overlap"]) -> "Overlap":
        """Add up the overlaps of all partitions, which have no ids in common."""
        parts = list(parts)
        numbers = (sum(getattr(part, name) for part in parts) for name in ("num_events", "num_listed", "num_undescribed", "num_unused"))
        examples = (
            [text for part in parts for text in getattr(part, name)][:_NUM_EXAMPLES] for name in ("undescribed", "unused", "shared")
        )
        return cls(*numbers, *examples)

    def warnings(self, what: str, key: str, takes_unused: bool = True) -> list[str]:
        """Return a warning if most ids of one side are missing on the other; `what` is items or users, `key` their column setting."""
        found = []
        advice = f"an id must be spelled alike in both tables, whose column {key} names"
        if self.num_listed and 2 * self.num_undescribed > self.num_events:
            found.append(
                f"{self.num_undescribed} of {self.num_events} {what} of the events are not in the {what} table, such as "
                f"{_shown(self.undescribed)}; the table has {what} such as {_shown(self.unused or self.shared)}: {advice}"
            )
        elif takes_unused and 2 * self.num_unused > self.num_listed:
            found.append(
                f"{self.num_unused} of {self.num_listed} {what} of the {what} table are in no event, such as {_shown(self.unused)}; "
                f"events have {what} such as {_shown(self.undescribed or self.shared)}: {advice}"
            )
        return found


def _missing(ids: pa.Array, others: pa.Array) -> pa.Array:
    return ids.filter(pc.invert(pc.is_in(ids, value_set=others)))


def _shown(ids: list[str]) -> str:
    return ", ".join(f"'{text[:_SHOWN_CHARACTERS]}'" for text in ids)
