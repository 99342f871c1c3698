"""Puts a service under load: latency, answers per second and errors at several numbers of clients."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from recsys import terminal
from recsys.config import Config
from recsys.errors import UserError
from recsys.exports.files import USERS_FILE
from recsys.exports.profiles import ArrowProfiles
from recsys.exports.registry import Registry
from serve.app import resolve_alias

WARM_UP_SECONDS = 0.5
"""Answers of the first moments of a measurement are not counted."""

TIMEOUT_SECONDS = 60


def measure_service(config: Config) -> dict[str, Any]:
    """Ask for lists of the served export's users with each number of `load.clients`; print a table and return the rows."""
    service = config.service
    url = config.load.url or f"http://{service.host}:{service.port}"
    token = os.environ.get(service.token_env, "")
    if not token:
        raise UserError(f"the environment variable {service.token_env} (service.token_env) has no token for the service")
    bodies = [json.dumps({"user_id": user_id, "limit": config.load.limit}).encode() for user_id in _user_ids(config)]
    rows = []
    for clients in config.load.clients:
        measured = asyncio.run(measure(f"{url}/v1/recommend", token, bodies, clients, config.load.seconds, config.load.rate))
        rows.append({"clients": clients, **measured})
        print(_line(rows[-1]), file=terminal.stream())
    return {"url": url, "rate": config.load.rate, "measurements": rows}


async def measure(url: str, token: str, bodies: Sequence[bytes], clients: int, seconds: float, rate: float = 0.0) -> dict[str, Any]:
    """Post bodies in turn for some seconds and return percentiles of the latency (ms), answers per second and errors by status.

    With a `rate`, latency counts from the time when a request was due, so that a slow answer also delays those behind it.
    """
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    record = _Record(time.perf_counter() + WARM_UP_SECONDS)
    schedule = _schedule(record.begin - WARM_UP_SECONDS, rate)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout) as session:
        end = record.begin + seconds
        send = cycle(bodies)
        await asyncio.gather(*(_client(session, url, send, schedule, record, end) for _ in range(clients)))
    return record.summary(seconds)


@dataclass
class _Record:
    begin: float
    sent: int = 0
    seconds: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, begin: float, end: float, status: str) -> None:
        self.sent += 1
        if begin < self.begin:
            return
        if status == "200":
            self.seconds.append(end - begin)
        else:
            self.errors[status] = self.errors.get(status, 0) + 1

    def summary(self, seconds: float) -> dict[str, Any]:
        answered = np.array(self.seconds or [np.nan]) * 1000
        percentiles = {f"p{part}_ms": round(float(np.percentile(answered, part)), 3) for part in (50, 90, 99)}
        return {
            "sent": self.sent,
            "answers": len(self.seconds),
            "rps": round(len(self.seconds) / seconds, 1),
            **percentiles,
            "max_ms": round(float(answered.max()), 3),
            "errors": self.errors,
        }


def _schedule(begin: float, rate: float) -> Callable[[], float]:
    """Return a function that gives the time when the next request is due; without a rate, now."""
    if not rate:
        return time.perf_counter
    numbers = count()
    return lambda: begin + next(numbers) / rate


async def _client(
    session: aiohttp.ClientSession, url: str, bodies: Iterator[bytes], schedule: Callable[[], float], record: _Record, end: float
) -> None:
    while True:
        begin = schedule()
        if begin >= end:
            return
        if (wait := begin - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        try:
            async with session.post(url, data=next(bodies)) as response:
                await response.read()
                status = str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        record.add(begin, time.perf_counter(), status)


def _user_ids(config: Config) -> list[str]:
    """Return ids of users of the version that `service.alias` names, in a fixed order."""
    registry = Registry.of_service(config)
    folder = registry.fetch(resolve_alias(registry, config), Path(config.run.scratch) / "served", only=(USERS_FILE,))
    return [user_id for user_id, _ in islice(ArrowProfiles.open(folder / USERS_FILE).items(), config.load.num_users)]


def _line(row: dict[str, Any]) -> str:
    errors = ", ".join(f"{number} x {status}" for status, number in sorted(row["errors"].items())) or "none"
    latency = f"p50 {row['p50_ms']:.2f} ms, p90 {row['p90_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms"
    return f"{row['clients']:>4} clients   {row['rps']:>8,.1f} answers/s   {latency}   errors: {errors}"
