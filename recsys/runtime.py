"""How a verb gets a Ray: the cluster that `RAY_ADDRESS` names, or a private one on loopback that ends with the verb."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray

from recsys.config import Config
from recsys.storage import private_folder

LONGEST_SOCKET_FOLDER = 45
"""Ray's sockets lie about 60 characters below its folder, and a socket's path may have 107."""


def is_attached() -> bool:
    """Tell whether a cluster was given; `ray job submit` sets the address for the jobs that it starts."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connect(config: Config) -> Iterator[None]:
    """Attach to the given cluster, or run a private Ray on loopback until the block ends."""
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        if is_attached():
            ray.init(log_to_driver=True)
        else:
            ray.init(
                num_cpus=logical_cpus(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=free_port(),
                _node_ip_address="127.0.0.1",
                _temp_dir=stack.enter_context(ray_folder(config)),
            )
        stack.callback(ray.shutdown)
        yield


def logical_cpus() -> int:
    """Slots of a private Ray: a laptop shares its cores among workers, trials and replicas that mostly wait."""
    return max(6, 2 * (os.cpu_count() or 1))


@contextlib.contextmanager
def ray_folder(config: Config) -> Iterator[str]:
    """Give Ray a private folder: `run.scratch`/ray, or a temporary one where that path is too long for sockets."""
    wanted = Path(config.run.scratch) / "ray"
    if len(str(wanted)) <= LONGEST_SOCKET_FOLDER:
        yield str(private_folder(wanted))
        return
    temporary = tempfile.mkdtemp(prefix="recsys-ray-")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def free_port() -> int:
    """Ask the kernel for a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
