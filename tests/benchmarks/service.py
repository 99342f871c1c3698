"""The service compared with plain FastAPI around the same predictor and with an earlier build, alternating in one run.

`python -m tests.benchmarks.service`. All systems run at the same time on this machine, on exports with random weights of the same sizes;
one after another is put under load (`serve.load`), for several rounds. `half` sends at half the rate that 32 clients reached, whether or
not answers arrive. Processor time is that of the processes that requests pass: proxies and replicas.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from recsys.launch.head import free_port, stop_head
from serve.measuring import measure
from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny

ROOT = Path(__file__).parents[2]
CLIENTS = (1, 8, 32, 64)
HALF_LOAD_CLIENTS = 32
ON_THE_WAY = ("ServeReplica", "haproxy", "ProxyActor", "uvicorn")
"""Parts of the names of processes that requests pass."""

PUBLISH = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
import tests.exports as exports
folder, port, num_users, num_items, service = Path(sys.argv[1]), *json.loads(sys.argv[2])
make = exports.make_dataset
exports.make_dataset = lambda storage, **_: make(storage, num_users=num_users, num_items=num_items, max_history=50)
config = exports.service_config(folder, port=port, **service)
exports.publish_export(config, "v1", values={"data.max_history": 50, "model.width": 64})
"""
"""Publishes an export with the code in the working directory."""

START = (
    PUBLISH
    + """
import inspect, subprocess
try:
    from recsys.launch.head import start_head
except ImportError:
    from recsys.runtime import start_head
ray = folder / "ray"
ray.mkdir()
chosen = {"service": config.service} if "service" in inspect.signature(start_head).parameters else {}
head = start_head(str(ray), **chosen)
settings = {"storage.root": config.storage.root, "run.scratch": config.run.scratch, "service.port": port}
settings |= {f"service.{key}": value for key, value in service.items()}
command = [sys.executable, "-m", "serve.deploy", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]
done = subprocess.run(command, env={**os.environ, **head.environment}, stdout=subprocess.DEVNULL)
print(json.dumps({"process_id": head.process_id, "returncode": done.returncode}))
"""
)
"""Starts Ray and the service with the code in the working directory."""

PLAIN = """
import sys
from pathlib import Path
import torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from recsys.exports.files import load_export
torch.set_num_threads(1)
export = load_export(Path(sys.argv[1]))
predictor, profiles = export.predictor, export.profiles
app = FastAPI()
class Request(BaseModel):
    user_id: str
    k: int = 10
@app.post("/v1/recommend")
async def recommend(request: Request):
    history = profiles.find(request.user_id)
    (ranking,) = predictor.recommend([history], request.k, [history.items])
    names = predictor.catalogue
    rows = zip(ranking.items.tolist(), ranking.scores.tolist())
    return {"version": "v1", "items": [{"item_id": names.item_ids[i], "title": names.titles[i], "score": s} for i, s in rows]}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
"""
"""Serves an export with plain FastAPI in one process."""


@dataclass(frozen=True)
class System:
    """A running system under test."""

    name: str
    url: str
    process: psutil.Process

    def processor_seconds(self) -> float:
        """Return the processor time so far of the processes that requests pass."""
        total = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                if any(part in " ".join([process.name(), *process.cmdline()]) for part in ON_THE_WAY):
                    total += sum(process.cpu_times()[:2])
        return total


def main() -> None:
    """Measure all systems; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_tiny(parser)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--former", help="commit of an earlier build to compare with")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.users, arguments.items, arguments.rounds, arguments.seconds = 60, 40, 1, 0.5
    os.environ["RECSYS_SERVICE_TOKEN"] = token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as running:
        systems = [
            running.enter_context(_ours(Path(folder) / f"r{number}", arguments, number)) for number in ((1,) if arguments.tiny else (1, 2))
        ]
        systems.insert(0, running.enter_context(_plain(Path(folder) / "r1")))
        if arguments.former:
            systems.append(running.enter_context(_former(Path(folder) / "former", arguments)))
        rounds = [_round(systems, token, arguments) for _ in range(arguments.rounds)]
    rows = [_median([rows[index] for rows in rounds]) for index in range(len(rounds[0]))]
    show(f"{arguments.users} users, {arguments.items} items; medians of {arguments.rounds} rounds", rows)
    print(json.dumps({"rows": rows}))


def _round(systems: list[System], token: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every system once; the same loads follow each other for all systems, so that a slow moment of the machine meets all."""
    bodies = [json.dumps({"user_id": f"user-{number}", "k": 10}).encode() for number in range(arguments.users)]
    rows, fastest = [], {}
    for clients in (*CLIENTS, "half"):
        for system in systems:
            rate = fastest[system.name] / 2 if clients == "half" else 0.0
            before = system.processor_seconds()
            number = HALF_LOAD_CLIENTS if clients == "half" else int(clients)
            found = asyncio.run(measure(f"{system.url}/v1/recommend", token, bodies, number, arguments.seconds, rate))
            spent = system.processor_seconds() - before
            if clients == HALF_LOAD_CLIENTS:
                fastest[system.name] = found["rps"]
            rows.append(
                {
                    "system": system.name,
                    "clients": clients,
                    "rps": found["rps"],
                    "p50 ms": found["p50_ms"],
                    "p99 ms": found["p99_ms"],
                    "CPU ms": 1000 * spent / max(found["sent"], 1),
                    "errors": sum(found["errors"].values()),
                }
            )
    return rows


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the rounds, and the sum of the errors."""
    first = rows[0]
    figures = {key: statistics.median(row[key] for row in rows) for key in ("rps", "p50 ms", "p99 ms", "CPU ms")}
    return {"system": first["system"], "clients": first["clients"], **figures, "errors": sum(row["errors"] for row in rows)}


@contextlib.contextmanager
def _ours(folder: Path, arguments: argparse.Namespace, replicas: int) -> Iterator[System]:
    service = {"min_replicas": replicas, "max_replicas": replicas}
    with _started(f"ours, {replicas} replica{'s' * (replicas > 1)}", folder, ROOT, arguments, service) as system:
        yield system


@contextlib.contextmanager
def _former(folder: Path, arguments: argparse.Namespace) -> Iterator[System]:
    folder.mkdir()
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", tree, arguments.former], cwd=ROOT, check=True, capture_output=True)
    try:
        with _started(arguments.former, folder / "run", tree, arguments, {}) as system:
            yield system
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True, capture_output=True)


@contextlib.contextmanager
def _started(name: str, folder: Path, tree: Path, arguments: argparse.Namespace, service: dict[str, Any]) -> Iterator[System]:
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-c", START, str(folder), json.dumps([port, arguments.users, arguments.items, service])]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"PYTHONPATH": str(tree)})
    started = json.loads(done.stdout.splitlines()[-1])
    try:
        if started["returncode"]:
            raise RuntimeError(f"{name} did not start")
        yield System(name, f"http://127.0.0.1:{port}", psutil.Process(started["process_id"]))
    finally:
        stop_head(started["process_id"])


@contextlib.contextmanager
def _plain(published: Path) -> Iterator[System]:
    """Serve the export that another system has fetched, with plain FastAPI."""
    (export,) = (published / "scratch" / "served").glob("*/v1")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", PLAIN, str(export), str(port), "uvicorn"], cwd=ROOT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/docs")
                break
            time.sleep(0.1)
        yield System("FastAPI", url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
