"""A running service for tests: a Ray head on loopback, an export with random weights, and a client."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from recsys.config import Config
from recsys.exports.files import Export
from recsys.launch.head import Head, free_port, start_head, stop_head
from tests.exports import publish_export, service_config

ROOT = Path(__file__).parents[1]
SETTINGS = ("port", "max_batch_size", "min_replicas", "request_timeout_seconds")


@dataclass(frozen=True)
class Service:
    """A running service, the version that it serves first, and its address and token."""

    config: Config
    head: Head
    folder: Path
    token: str
    export: Export
    deployed: dict[str, Any]
    client: httpx.Client

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """Post a request and return the answer."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def deploy(self) -> "subprocess.CompletedProcess[str]":
        """Run `serve.deploy` again."""
        return run_verb("serve.deploy", self.config, self.head)

    def roll_back(self) -> "subprocess.CompletedProcess[str]":
        """Run `serve.rollback`."""
        return run_verb("serve.rollback", self.config, self.head)


def run_verb(module: str, config: Config, head: Head) -> "subprocess.CompletedProcess[str]":
    """Run a verb of the service as a command on a head's cluster."""
    settings = {"storage.root": config.storage.root, "run.scratch": config.run.scratch}
    settings |= {f"service.{key}": getattr(config.service, key) for key in SETTINGS}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", module, *overrides]
    environment = {**os.environ, **head.environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode == 1:  # an unexpected end: its reason is in the newest log
        logs = sorted((Path(config.run.scratch) / "logs").glob(f"{module}-*"), key=lambda path: path.stat().st_mtime)
        done.stderr += "".join(path.read_text(errors="replace")[-3000:] for path in logs[-1:])
    return done


@contextlib.contextmanager
def running_service(folder: Path) -> Iterator[Service]:
    """Run a service with two replicas that serve version v1."""
    config = service_config(folder, port=free_port(), max_batch_size=8, min_replicas=2, request_timeout_seconds=60.0)
    export = publish_export(config, "v1", seed=1)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.service.token_env, token)
        patch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")  # else the head lingers for its replicas when it is stopped
        head = start_head(ray_folder, service=config.service)
        try:
            done = run_verb("serve.deploy", config, head)
            assert done.returncode == 0, done.stderr[-3000:]
            deployed = json.loads(done.stdout.splitlines()[-1])
            with httpx.Client(base_url=deployed["url"], headers={"Authorization": f"Bearer {token}"}, timeout=90) as client:
                yield Service(config, head, Path(ray_folder), token, export, deployed, client)
        finally:
            stop_head(head.process_id)


def addresses_of(service: Service) -> list[str]:
    """Return the addresses of the replicas, which HAProxy sends requests to."""
    found = []
    for replica in replicas(service):
        ports = {connection.laddr.port for connection in replica.net_connections("inet") if connection.status == psutil.CONN_LISTEN}
        for port in ports:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).raise_for_status()
                found.append(f"http://127.0.0.1:{port}")
    return found


def first_item(service: Service, address: str, user_id: str) -> str:
    headers = {"Authorization": f"Bearer {service.token}"}
    answer = httpx.post(f"{address}/v1/recommend", json={"user_id": user_id, "limit": 1}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"][0]["item_id"]


def until(is_true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until a condition holds on five calls in a row, so that it holds on both replicas."""
    deadline, in_a_row = time.monotonic() + seconds, 0
    while in_a_row < 5:
        in_a_row = in_a_row + 1 if is_true() else 0
        assert time.monotonic() < deadline


def files_of(service: Service) -> list[Path]:
    roots = (service.folder, Path(service.config.storage.root).parent)
    return [path for root in roots for path in root.rglob("*") if path.is_file()]


def processes_of(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.head.process_id).children(recursive=True)


def replicas(service: Service) -> list[psutil.Process]:
    """Find the processes of the replicas that live, by process id."""
    found = processes_of(service)
    return sorted((process for process in found if "ServeReplica:recsys:" in " ".join(process.cmdline())), key=lambda found: found.pid)
