"""The log in Redis: for services on several nodes. Durable as the server is (`appendonly yes`)."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from serve.live.changes import CHANGE, MAX_READ, Change, Entry, Erased, Merged, hash_of

POLL_SECONDS = 0.05

_APPEND = """
local log, ids, counter, owners = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local is_new = {}
for first = 1, #ARGV, 5 do
  local kind, id, owner, session, body = ARGV[first], ARGV[first + 1], ARGV[first + 2], ARGV[first + 3], ARGV[first + 4]
  if kind == 'erase' then
    for _, position in ipairs(redis.call('SMEMBERS', owners .. owner)) do
      for _, member in ipairs(redis.call('ZRANGEBYSCORE', log, position, position)) do
        redis.call('HDEL', ids, cjson.decode(member).change_id)
      end
      redis.call('ZREMRANGEBYSCORE', log, position, position)
    end
    redis.call('DEL', owners .. owner)
  elseif kind == 'merge' then
    redis.call('SUNIONSTORE', owners .. owner, owners .. owner, owners .. session)
    redis.call('DEL', owners .. session)
  end
  local new = redis.call('HSETNX', ids, id, 1)
  if new == 1 then
    local position = redis.call('INCR', counter)
    redis.call('ZADD', log, position, body)
    if kind ~= 'erase' then redis.call('SADD', owners .. owner, position) end
  end
  is_new[#is_new + 1] = new
end
return is_new
"""
"""Appends changes atomically. `log` is a sorted set of changes by position, `ids` has their ids, `owners` the positions of each key's."""


class RedisLog:
    """A log in a Redis server, under keys that begin with `name`."""

    def __init__(self, url: str, name: str) -> None:
        self._redis = Redis.from_url(url, decode_responses=True)
        self._keys = [f"{{{name}}}:{part}" for part in ("log", "ids", "counter", "owner:")]  # the braces keep them on one cluster node
        self._append = self._redis.register_script(_APPEND)

    async def append(self, changes: Sequence[Change]) -> list[bool]:
        """See `ChangeLog.append`."""
        arguments: list[str] = []
        for change in changes:
            owner = change.key_hash if isinstance(change, Erased) else hash_of(change.key)
            session = hash_of(change.session) if isinstance(change, Merged) else ""
            arguments += [change.kind, change.change_id, owner, session, change.model_dump_json()]
        return [bool(new) for new in await self._append(keys=self._keys, args=arguments)]

    async def read(self, after: int, wait_seconds: float) -> list[Entry]:
        """See `ChangeLog.read`."""
        deadline = time.monotonic() + wait_seconds
        while not (found := await self._read(after)) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        return found

    async def _read(self, after: int) -> list[Entry]:
        found: Any = await self._redis.zrangebyscore(self._keys[0], f"({after}", "+inf", start=0, num=MAX_READ, withscores=True)
        return [Entry(int(position), CHANGE.validate_json(body)) for body, position in found]
