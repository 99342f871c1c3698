"""Ray for a verb: the cluster at `RAY_ADDRESS`, or a private head on loopback that stops with the verb."""

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from recsys.config import Config
from recsys.config.service import ServiceConfig
from recsys.launch import haproxy
from recsys.store import private_folder

logger = logging.getLogger(__name__)

ADDRESS = "RAY_ADDRESS"
HEAD_RECORD = "head.json"
PRIVATE = "RECSYS_PRIVATE_RAY"
LONGEST_FOLDER = 24
"""A socket path has at most 107 characters: these, 13 for the folder's name, 43 for Ray's session and 25 for the dashboard's sockets."""

OBJECT_STORE_BYTES = 512 << 20
"""Stages exchange data through files, so Ray's object store holds little; by default it would take a third of the memory."""

FREE_PORTS = range(20_000, 30_000)
PORTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export", "ray-client-server")
START_SECONDS = 60
STOP_SECONDS = 20


@dataclass(frozen=True)
class Head:
    """A private Ray head on loopback, alive as long as its process is."""

    address: str
    dashboard: str  # empty if it has none
    process_id: int
    folder: str
    environment: dict[str, str]


@contextlib.contextmanager
def connect(config: Config) -> Iterator[None]:
    """Connect to the cluster at `RAY_ADDRESS`, or to a private head that stops with the block.

    Ray reads its environment when it is imported, so Ray must not be imported before a private head starts.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    with contextlib.nullcontext() if os.environ.get(ADDRESS) else _private_head(config):
        import ray

        logger.debug("Ray at %s", os.environ[ADDRESS])
        ray.init(log_to_driver=True, logging_level="warning")
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private_head(config: Config) -> Iterator[None]:
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before recsys.launch.head.connect prepared its environment")
    head = start_head(_ray_folder(config), _num_slots(config), ends_with_parent=True)
    environment = {**head.environment, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nothing announces the end of this machine
    before = {name: os.environ[name] for name in environment.keys() & os.environ.keys()}
    os.environ |= environment
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name, None)
        os.environ |= before
        stop_head(head.process_id)
        shutil.rmtree(head.folder, ignore_errors=True)


def start_head(folder: str, num_cpus: int = 6, ends_with_parent: bool = False, service: ServiceConfig | None = None) -> Head:
    """Start a head that listens only on loopback, with token authentication and all its files below `folder`.

    This runs `ray start`, because `ray.init` would listen on the machine's address. With `ends_with_parent` the kernel terminates the
    head when this process dies for any reason, and the head has no dashboard, since starting one takes longest. With `service`, HTTP
    requests to Ray Serve on this head go through the proxy that it names.
    """
    port, dashboard, *others = free_ports(2 + len(PORTS))
    address = f"127.0.0.1:{port}"
    environment = {
        ADDRESS: address,
        PRIVATE: "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray replaces loopback by the machine's address
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "temp-dir": folder,
        "num-cpus": num_cpus,
        "object-store-memory": OBJECT_STORE_BYTES,
        **{f"{service}-port": other for service, other in zip(PORTS, others, strict=True)},
        "include-dashboard": str(not ends_with_parent).lower(),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = (Path(folder) / "head.log").open("wb")
    own_programs = str(Path(sys.executable).parent)  # a submitted job runs the first `python` in its head's PATH
    child_environment = {
        **os.environ,
        **environment,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # otherwise a head with a service takes half a minute to stop
        "PATH": os.pathsep.join([own_programs, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if service is not None and service.proxy == "haproxy":
        stats, metrics = free_ports(2)
        child_environment |= haproxy.environment(
            _proxy_folder(folder), (stats, metrics), service.request_timeout_seconds, os.cpu_count() or 1
        )
    process = subprocess.Popen(
        command,
        env=child_environment,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=haproxy.end_with_parent if ends_with_parent else None,  # noqa: PLW1509 - it only makes one system call
    )
    _wait_until_listening(process, port if ends_with_parent else dashboard, Path(folder) / "head.log")
    return Head(address, "" if ends_with_parent else f"http://127.0.0.1:{dashboard}", process.pid, folder, environment)


@contextlib.contextmanager
def local_head(config: Config, outlives: bool) -> Iterator[None]:
    """Point this process and its children at a cluster: the one at `RAY_ADDRESS`, or a head on this machine.

    The head stops with the block unless `outlives`; the next caller then finds it by the record in `run.scratch`.
    """
    if os.environ.get(ADDRESS):
        yield
        return
    record = private_folder(Path(config.run.scratch)) / HEAD_RECORD
    with contextlib.ExitStack() as stack:
        head = _recorded_head(record)
        if head is None:
            head = start_head(
                _ray_folder(config), _num_slots(config), ends_with_parent=not outlives, service=config.service if outlives else None
            )
            record.touch(mode=0o600)
            record.write_text(json.dumps(asdict(head)), encoding="utf-8")
            stack.callback(stop_local_head, config)
        os.environ |= head.environment
        yield
        if outlives:
            stack.pop_all()


def stop_local_head(config: Config) -> bool:
    """Stop the head that `local_head` left running, with everything on it; return whether there was one."""
    record = Path(config.run.scratch) / HEAD_RECORD
    head = _recorded_head(record)
    if head is not None:
        stop_head(head.process_id)
        shutil.rmtree(head.folder, ignore_errors=True)
    record.unlink(missing_ok=True)
    return head is not None


def stop_head(process_id: int) -> None:
    """Stop a head and all processes that it started."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(process_id)
        proxy = process.environ().get(haproxy.FOLDER)
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except psutil.TimeoutExpired:
            os.killpg(process_id, signal.SIGKILL)
        if proxy:
            shutil.rmtree(proxy, ignore_errors=True)


def _num_slots(config: Config) -> int:
    """Return a head's logical CPUs: enough, also on a laptop, for two trials with their workers or for replicas that mostly wait."""
    two_trials = 2 * (1 + math.ceil(config.training.max_workers * config.training.cpus_per_worker))
    return max(two_trials, 2 * (os.cpu_count() or 1))


def free_port() -> int:
    """Return a free loopback port, as `free_ports` does."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return distinct free loopback ports, outside the port ranges of the kernel, of Ray's workers and of Ray Serve's replicas."""
    found: list[int] = []
    with contextlib.ExitStack() as bound:
        for port in secrets.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
            with contextlib.suppress(OSError):
                bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
                if len(found) == count:
                    return found
    raise RuntimeError(f"fewer than {count} free ports from {FREE_PORTS.start} to {FREE_PORTS.stop - 1}")


def _ray_folder(config: Config) -> str:
    """Create a private folder for one head: below `run.scratch`, or a temporary one if that path is too long for sockets."""
    parent = private_folder(Path(config.run.scratch))
    return tempfile.mkdtemp(prefix="ray-", dir=parent if len(str(parent)) <= LONGEST_FOLDER else None)


def _proxy_folder(folder: str) -> Path:
    """Create a private folder for HAProxy: below the head's, or a temporary one if that path is too long for its socket."""
    below = Path(folder) / "haproxy"
    if len(str(below)) > haproxy.LONGEST_FOLDER:
        return Path(tempfile.mkdtemp(prefix="ha-"))
    return private_folder(below)


def _wait_until_listening(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    how = f"within {START_SECONDS} s" if process.poll() is None else f"(exit code {process.returncode})"
    stop_head(process.pid)
    raise RuntimeError(f"Ray did not start {how}:\n{log.read_text(errors='replace')[-2000:]}")


def _recorded_head(record: Path) -> Head | None:
    if not record.exists():
        return None
    head = Head(**json.loads(record.read_text(encoding="utf-8")))
    try:
        return head if f"--temp-dir={head.folder}" in psutil.Process(head.process_id).cmdline() else None
    except psutil.Error:
        return None
