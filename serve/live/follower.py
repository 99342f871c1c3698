"""Keeps a replica's copy of the log up to date, and gives access to the log's owner."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayActorError
from redis.exceptions import RedisError

from recsys.config import Config
from recsys.errors import UserError
from serve.live.changes import POSITION_BEFORE_ALL, Change, ChangeLog, Entry
from serve.live.redis_log import RedisLog
from serve.live.sqlite_log import SqliteLog

WAIT_SECONDS = 10.0
RETRY_SECONDS = 0.2
NAMESPACE = "recsys"
HEAD = "node:__internal_head__"
UNREACHABLE = (RayActorError, RedisError, OSError)
"""What a log raises that cannot be reached at the moment."""

logger = logging.getLogger("ray.serve")


class OwnedLog:
    """The embedded log, owned by an actor on the head, where its file is; a `ChangeLog`.

    Ray starts the actor again if it dies; a call that meets a dead one waits.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._owner = (
            ray.remote(SqliteLog)
            .options(
                name=f"live-{name}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                resources={HEAD: 0.001},
                max_restarts=-1,
                max_task_retries=-1,  # changes have ids, so a repeated call changes nothing
                max_concurrency=1000,
            )
            .remote(path)
        )

    async def append(self, changes: Sequence[Change]) -> list[bool]:
        """See `ChangeLog.append`."""
        found: list[bool] = await self._owner.append.remote(changes)
        return found

    async def read(self, after: int, wait_seconds: float) -> list[Entry]:
        """See `ChangeLog.read`."""
        found: list[Entry] = await self._owner.read.remote(after, wait_seconds)
        return found


def open_log(config: Config) -> ChangeLog:
    """Open the live log that `service.live` chooses for the served export.

    Raises:
        UserError: Redis is chosen, and its address is missing.
    """
    service, name = config.service, config.served_export
    if service.live == "embedded":
        return OwnedLog(name, Path(config.run.scratch) / "live" / name / "changes.sqlite")
    url = os.environ.get(service.redis_env, "")
    if not url:
        raise UserError(
            f"service.live = redis: the environment variable {service.redis_env} (service.redis_env) is not set; "
            "redis://:password@host:6379/0 would work"
        )
    return RedisLog(url, f"recsys:{name}")


class Follower:
    """Applies the log's changes to a copy, in the event loop that starts it."""

    def __init__(self, log: ChangeLog, apply: Callable[[Change], None]) -> None:
        self._log, self._apply = log, apply
        self._position = POSITION_BEFORE_ALL
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Apply everything that the log holds, and go on in the background."""
        while await self._step(0):
            pass
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                await self._step(WAIT_SECONDS)
            except UNREACHABLE as error:
                logger.warning("the live log cannot be read: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _step(self, wait_seconds: float) -> int:
        entries = await self._log.read(self._position, wait_seconds)
        for entry in entries:
            self._apply(entry.change)
            self._position = entry.position
        return len(entries)
