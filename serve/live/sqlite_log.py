"""The embedded log: an SQLite file that one actor owns."""

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from recsys.store import private_folder
from serve.live.changes import CHANGE, MAX_READ, Change, Entry, Erased, Merged, hash_of

_SCHEMA = """
CREATE TABLE IF NOT EXISTS changes (position INTEGER PRIMARY KEY AUTOINCREMENT, change_id TEXT UNIQUE, owner TEXT, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS owners ON changes (owner);
"""


class SqliteLog:
    """A log in one file (write-ahead mode). A change is durable against the end of the process when `append` returns.

    The hash of a change's key is stored with it, so that an erasure finds all of them; `secure_delete` overwrites what it removes.
    """

    def __init__(self, path: Path) -> None:
        private_folder(path.parent)
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        path.chmod(0o600)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)
        self._grown = asyncio.Event()

    async def append(self, changes: Sequence[Change]) -> list[bool]:
        """See `ChangeLog.append`; all changes are one transaction."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            is_new = [self._insert(change) for change in changes]
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        if any(isinstance(change, Erased) for change in changes):
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what was erased is not left in the write-ahead file
        self._grown.set()
        self._grown = asyncio.Event()
        return is_new

    async def read(self, after: int, wait_seconds: float) -> list[Entry]:
        """See `ChangeLog.read`."""
        grown = self._grown
        if not (found := self._read(after)) and wait_seconds > 0:
            try:
                await asyncio.wait_for(grown.wait(), wait_seconds)
            except TimeoutError:
                return []
            found = self._read(after)
        return found

    def _insert(self, change: Change) -> bool:
        owner = None if isinstance(change, Erased) else hash_of(change.key)
        if isinstance(change, Erased):
            self._database.execute("DELETE FROM changes WHERE owner = ?", (change.key_hash,))
        elif isinstance(change, Merged):
            self._database.execute("UPDATE changes SET owner = ? WHERE owner = ?", (owner, hash_of(change.session)))
        done = self._database.execute(
            "INSERT OR IGNORE INTO changes (change_id, owner, body) VALUES (?, ?, ?)", (change.change_id, owner, change.model_dump_json())
        )
        return bool(done.rowcount)

    def _read(self, after: int) -> list[Entry]:
        rows = self._database.execute("SELECT position, body FROM changes WHERE position > ? ORDER BY position LIMIT ?", (after, MAX_READ))
        return [Entry(position, CHANGE.validate_json(body)) for position, body in rows]
