"""The changes that the live log holds, and the protocol of a log. Nothing here does I/O."""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SESSION = "session:"
"""Prefix of the keys of sessions, which no user id has: ids of users are stored with another one."""

USER = "user:"
POSITION_BEFORE_ALL = 0
MAX_READ = 5000
"""Entries that a log returns at once."""


class _Change(BaseModel):
    model_config = ConfigDict(frozen=True)

    change_id: str  # a change with the same id happens once


class Happened(_Change):
    """An event: `key` (a user or a session) did `event` with an item."""

    kind: Literal["event"] = "event"
    key: str
    item_id: str
    event: str
    timestamp: int
    value: float | None = None


class Merged(_Change):
    """What a session did belongs to a user from now on."""

    kind: Literal["merge"] = "merge"
    session: str
    key: str


class Erased(_Change):
    """A user is erased; only a hash of the key remains."""

    kind: Literal["erase"] = "erase"
    key_hash: str


Change = Annotated[Happened | Merged | Erased, Field(discriminator="kind")]
CHANGE: TypeAdapter[Change] = TypeAdapter(Change)


class Entry(NamedTuple):
    """A change and its position in the log; positions grow."""

    position: int
    change: Change


class ChangeLog(Protocol):
    """A durable, ordered log of changes."""

    async def append(self, changes: Sequence[Change]) -> list[bool]:
        """Append changes and return, for each, whether it is new; durable when it returns. An erasure removes what it erases."""

    async def read(self, after: int, wait_seconds: float) -> list[Entry]:
        """Return entries after a position, oldest first, at most MAX_READ; waits for the first one, and returns [] in vain."""


def user_key(user_id: str) -> str:
    """Return the key of a user."""
    return f"{USER}{user_id}"


def session_key(session_id: str) -> str:
    """Return the key of a session."""
    return f"{SESSION}{session_id}"


def hash_of(key: str) -> str:
    """Return the hash that stands for an erased key."""
    return hashlib.sha256(key.encode()).hexdigest()
