"""Shared fixtures: real S3 servers on loopback, and storages on them."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.config import Config
from hypothesis import settings

from recsys.launch.head import free_port
from recsys.store import Storage
from tests.proxy import FaultProxy
from tests.servers import answers

# Tests run in parallel: with a thread per core in each process, OpenMP's barriers wait up to 50 times as long as one thread computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the same modules

settings.register_profile("any speed", settings(), deadline=None)  # an example may be the first call of a library
settings.load_profile("any speed")

ACCESS_KEY = "AKIDTESTTESTTEST"
SECRET_KEY = "secret-of-the-tests-and-of-nothing-else"


@dataclass(frozen=True)
class S3Server:
    name: str
    endpoint: str

    def fresh_storage(self) -> Storage:
        """Create a new bucket and return a storage in it."""
        bucket = f"test-{uuid.uuid4().hex}"
        client = boto3.Session().client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
        )
        client.create_bucket(Bucket=bucket)
        return Storage(f"s3://{bucket}/store", self.endpoint)


def kill_descendants(verb: str) -> None:
    """Kill all descendants of this process whose command line contains `verb`."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if verb in " ".join(child.cmdline()):
                child.kill()


@contextmanager
def local_ray(folder: Path) -> Iterator[None]:
    """Run Ray in the test's process; all instances use the same token, since Ray keeps the first one that it reads."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # otherwise Ray writes a token to the home folder
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=str(folder))
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """Set the credentials of the test servers and hide the user's own AWS settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        yield


def _wait_until_it_answers(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if answers(endpoint):
            return
        time.sleep(0.1)
    pytest.fail(f"{process.args} does not answer (exit code {process.poll()}): {log.read_text()[-2000:]}")


def _run_server(name: str, arguments: list[str], port: int, folder: Path) -> Iterator[S3Server]:
    log = folder / f"{name}.log"
    endpoint = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(process, endpoint, log)
        yield S3Server(name, endpoint)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def moto_server(aws_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run moto's server, which keeps objects in memory and supports `If-None-Match`."""
    port = free_port()
    arguments = [sys.executable, str(Path(__file__).with_name("atomic_moto.py")), "-H", "127.0.0.1", "-p", str(port)]
    yield from _run_server("moto", arguments, port, tmp_path_factory.mktemp("moto"))


@pytest.fixture(scope="session")
def rclone_server(aws_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run rclone on a folder; it checks signatures and ignores `If-None-Match`."""
    port = free_port()
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "buckets").mkdir()
    rclone = Path(sys.executable).with_name("rclone")
    arguments = [
        str(rclone),
        "serve",
        "s3",
        "--config",
        os.devnull,
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{ACCESS_KEY},{SECRET_KEY}",
    ]
    yield from _run_server("rclone", [*arguments, str(folder / "buckets")], port, folder)


@pytest.fixture(params=["moto", "rclone"])
def s3_proxy(request: pytest.FixtureRequest) -> Iterator[FaultProxy]:
    """Run a proxy in front of each S3 server; it injects no faults until a test sets them."""
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    with FaultProxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def faulty_storage(s3_proxy: FaultProxy) -> Storage:
    """Return an empty storage behind the proxy."""
    return S3Server("proxy", s3_proxy.endpoint).fresh_storage()


def _storage_on(kind: str, request: pytest.FixtureRequest) -> Storage:
    if kind == "local":
        return Storage(str(request.getfixturevalue("tmp_path") / "store"))
    server: S3Server = request.getfixturevalue(f"{kind}_server")
    return server.fresh_storage()


@pytest.fixture(params=["moto", "rclone"])
def s3_storage(request: pytest.FixtureRequest) -> Storage:
    """Return an empty storage on each S3 server."""
    return _storage_on(request.param, request)


@pytest.fixture(params=["local", "moto", "rclone"])
def any_storage(request: pytest.FixtureRequest) -> Storage:
    """Return an empty storage in a folder and on each S3 server."""
    return _storage_on(request.param, request)


@pytest.fixture(params=["local", "moto"])
def create_once_storage(request: pytest.FixtureRequest) -> Storage:
    """Return an empty storage on each backend with atomic create-once writes (not rclone, which ignores `If-None-Match`)."""
    return _storage_on(request.param, request)
