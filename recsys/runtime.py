"""How a verb gets a Ray: the cluster that `RAY_ADDRESS` names, or a private head on loopback that ends with the verb."""

import contextlib
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
from dataclasses import dataclass
from pathlib import Path

import ray

from recsys.config import Config
from recsys.storage import private_folder

ADDRESS = "RAY_ADDRESS"
LONGEST_FOLDER = 45
"""Ray's sockets lie about 60 characters below its folder, and a socket's path may have 107."""

START_SECONDS = 60
STOP_SECONDS = 20


@dataclass(frozen=True)
class Head:
    """A private Ray on loopback, alive as long as its process is."""

    address: str
    dashboard: str
    process_id: int
    environment: dict[str, str]


@contextlib.contextmanager
def connect(config: Config) -> Iterator[None]:
    """Attach to the given cluster, or run a private head until the block ends."""
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not os.environ.get(ADDRESS):
            stack.enter_context(private_head(config))
        ray.init(log_to_driver=True, logging_level="warning")
        stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def private_head(config: Config) -> Iterator[Head]:
    """Run a head for the block, this process's environment pointing at it."""
    saved = dict(os.environ)
    with _ray_folder(config) as folder:
        head = start_head(folder)
        try:
            os.environ |= head.environment
            yield head
        finally:
            stop_head(head.process_id)
            os.environ.clear()
            os.environ.update(saved)


def start_head(folder: str) -> Head:
    """Start a head that listens on loopback only, under a token of its own, with all its files below `folder`.

    `ray.init` would listen on the machine's address, so this is `ray start`.
    """
    port, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    environment = {ADDRESS: address, "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "runtime-env-agent-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
        "temp-dir": folder,
        "num-cpus": logical_cpus(),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = (Path(folder) / "head.log").open("wb")
    child_environment = {**os.environ, **environment, "RAY_AUTH_MODE": "token", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=child_environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    _wait_until_listening(process, dashboard, Path(folder) / "head.log")
    return Head(address, f"http://127.0.0.1:{dashboard}", process.pid, environment)


def stop_head(process_id: int) -> None:
    """End a head and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGTERM)
        for _ in range(STOP_SECONDS * 10):
            if _has_ended(process_id):
                return
            time.sleep(0.1)
        os.killpg(process_id, signal.SIGKILL)


def logical_cpus() -> int:
    """Slots of a private head: a laptop shares its cores among workers, trials and replicas that mostly wait."""
    return max(6, 2 * (os.cpu_count() or 1))


def free_port() -> int:
    """Ask the kernel for a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _ray_folder(config: Config) -> Iterator[str]:
    """Give Ray a private folder: `run.scratch`/ray, or a temporary one where that path is too long for sockets."""
    wanted = Path(config.run.scratch) / "ray"
    if len(str(wanted)) <= LONGEST_FOLDER:
        yield str(private_folder(wanted))
        return
    temporary = tempfile.mkdtemp(prefix="recsys-ray-")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _wait_until_listening(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    stop_head(process.pid)
    raise RuntimeError(f"Ray did not start within {START_SECONDS} s:\n{log.read_text(errors='replace')[-2000:]}")


def _has_ended(process_id: int) -> bool:
    try:
        return os.waitpid(process_id, os.WNOHANG)[0] == process_id
    except ChildProcessError:  # another process started it
        return not Path(f"/proc/{process_id}").exists()
