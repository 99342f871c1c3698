"""A replica's copy of what the log says of users, and the profiles that join it with those of the export."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.exports.profiles import ProfileStore
from serve.live.changes import Change, Erased, Happened, Merged, hash_of, user_key

if TYPE_CHECKING:
    from recsys.predictor import Predictor

MAX_EVENTS = 512
"""Events since the export that are held per user or session; older ones count as history only in the next export."""


class LiveEvent(NamedTuple):
    """An event since the export."""

    item_id: str
    event: str
    timestamp: int
    value: float | None


class LiveUsers:
    """Events by key. Changes are applied by one thread; others may look up at any time, since a key's events are replaced as a whole."""

    def __init__(self) -> None:
        self._events: dict[str, tuple[LiveEvent, ...]] = {}
        self._erased: set[str] = set()

    def apply(self, change: Change) -> None:
        """Apply a change of the log."""
        if isinstance(change, Happened):
            event = LiveEvent(change.item_id, change.event, change.timestamp, change.value)
            self._add(change.key, (event,))
        elif isinstance(change, Merged):
            self._add(change.key, self._events.pop(change.session, ()))
        elif isinstance(change, Erased):
            self._erased.add(change.key_hash)
            for key in [key for key in self._events if hash_of(key) == change.key_hash]:
                del self._events[key]

    def events(self, key: str) -> tuple[LiveEvent, ...]:
        """Return the events of a user or session, oldest first."""
        return self._events.get(key, ())

    def is_erased(self, key: str) -> bool:
        """Return whether what the export knows of a user must not be used."""
        return bool(self._erased) and hash_of(key) in self._erased

    def _add(self, key: str, events: tuple[LiveEvent, ...]) -> None:
        if events:
            joined = sorted((*self._events.get(key, ()), *events), key=lambda event: event.timestamp)
            self._events[key] = tuple(joined[-MAX_EVENTS:])


class LiveProfiles:
    """The export's profiles with the events since; a `ProfileStore`.

    Events of kinds or items that the version does not know are left out, as are those that its history already has.
    """

    def __init__(self, exported: ProfileStore, users: LiveUsers, predictor: "Predictor") -> None:
        self._exported, self._users, self._predictor = exported, users, predictor

    def find(self, user_id: str) -> Sequences | None:
        """Return a user's history up to now; None for a user of whom nothing is known."""
        key = user_key(user_id)
        exported = None if self._users.is_erased(key) else self._exported.find(user_id)
        return self._join(exported, self._users.events(key))

    def find_session(self, key: str) -> Sequences | None:
        """Return what a session did; None if nothing is known."""
        return self._join(None, self._users.events(key))

    def _join(self, exported: Sequences | None, events: Sequence[LiveEvent]) -> Sequences | None:
        if not events:
            return exported
        kinds, items, table = self._predictor.event_index, self._predictor.item_index, self._predictor.manifest.kind_table
        rows = [
            (items[event.item_id], kinds[event.event], event.timestamp, np.nan if event.value is None else event.value)
            for event in events
            if event.item_id in items and event.event in kinds and table[kinds[event.event]].in_history
        ]
        if exported is not None and len(exported.items):
            recent = exported.last(MAX_EVENTS)
            known = set(zip(recent.items.tolist(), recent.events.tolist(), recent.timestamps.tolist(), strict=True))
            rows = [row for row in rows if row[:3] not in known]
        if not rows:
            return exported
        live = Sequences.of(*zip(*rows, strict=True))
        if exported is None:
            return live
        columns = {name: np.concatenate([exported.flat(name), live.columns[name]]) for name in HISTORY_COLUMNS}
        return replace(exported, columns=columns, starts=np.zeros(1, np.int64), lengths=exported.lengths + live.lengths)
