"""Starts Serve on a running cluster, deploys a version, and waits until it answers."""

import logging
import multiprocessing
import time
import urllib.request
from multiprocessing.connection import Connection
from typing import Any

import ray.serve

from recsys.config import Config
from recsys.config.service import ServiceConfig
from recsys.errors import UserError
from recsys.exports.registry import Registry, previous_version
from recsys.launch.head import connect, free_port
from recsys.launch.serve_internals import serve_http_port
from serve.app import APPLICATION, REPLICA, build, version_in_service

ANY_ADDRESS = ("0.0.0.0", "::")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTHY_SECONDS = 60
STATUS_SECONDS = 30
TRY_SECONDS = 600

logger = logging.getLogger(__name__)


def roll_back(config: Config) -> dict[str, Any]:
    """Point `service.alias` to its version before the current one, and put that in service.

    Raises:
        UserError: there is no version before, or see `roll_out`.
    """
    registry = Registry.of_service(config)
    current = registry.resolve(config.service.alias)
    registry.roll_back(config.service.alias, "serve.rollback")
    return {**roll_out(config, is_new=False), "rolled_back": current}


def roll_out(config: Config, is_new: bool = True) -> dict[str, Any]:
    """Deploy the version that `service.alias` names on the cluster of `RAY_ADDRESS`, and wait until it answers.

    A version that is new is first loaded and asked in a process of its own, so that one that crashes or hangs meets no replica.

    Raises:
        UserError: the version did not start or was refused, or Serve does not answer at the configured address.
    """
    version = version_in_service(config)
    application = build(config, version)
    if is_new:
        _try_out(config, version)
    with connect(config):
        url = _start_http(config.service)
        try:
            ray.serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise UserError(f"version {version} did not start: {_find_reason() or error}") from error
        _wait_until_healthy(url)
        statuses = ray.serve.get_deployment_handle(REPLICA, APPLICATION).broadcast("status").results(timeout_s=STATUS_SECONDS)
    refusals = [status["refusal"] for status in statuses if status["refusal"]]
    if refusals:
        raise _turned_back(config, version, refusals[0])
    logger.info("serve: %s answers at %s", version, url)
    return {
        "url": url,
        "version": version,
        "alias": config.service.alias,
        "export": config.served_export,
        "replicas": len(statuses),
    }


def _try_out(config: Config, version: str) -> None:
    """Load a version and let it answer, in a child process.

    Raises:
        UserError: the version cannot be served.
    """
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_load_and_ask, args=(config, version, writing), name="try-out")
    process.start()
    writing.close()
    is_answered = reading.poll(TRY_SECONDS)
    try:
        reason = str(reading.recv()) if is_answered else f"it does not answer within {TRY_SECONDS} s"
    except EOFError:
        process.join()
        reason = f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    if reason:
        raise _turned_back(config, version, reason)


def _turned_back(config: Config, version: str, reason: str) -> UserError:
    """Point the alias to its version before the refused one, if there is any, and return the error that says so."""
    registry, alias = Registry.of_service(config), config.service.alias
    end = "there is no version before it"
    if registry.resolve(alias) == version and previous_version(registry.history(alias)):
        end = f"{alias} points to {registry.roll_back(alias, reason)} again"
    return UserError(f"version {version} cannot be served: {reason}; {end}")


def _load_and_ask(config: Config, version: str, writing: Connection) -> None:
    """Send an empty text if a version can be loaded and answers, and otherwise why not."""
    from serve.answers.answering import Answerer

    try:
        Answerer.load_checked(config, version)
        writing.send("")
    except Exception as error:
        writing.send(" ".join(str(error).split()) or type(error).__name__)


def _start_http(service: ServiceConfig) -> str:
    """Start Serve unless it runs; return its URL. On loopback only the head listens, otherwise every node with a replica."""
    ray.serve.start(
        proxy_location="HeadOnly" if service.host in LOOPBACK else "EveryNode",
        http_options={"host": service.host, "port": service.port or free_port()},
    )
    port = service.port or serve_http_port()  # port 0: use the port of the running Serve
    host = "127.0.0.1" if service.host in ANY_ADDRESS else service.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _find_reason() -> str:
    """Return the exception that stopped a deployment from starting: the last unindented line of its message with an error."""
    application = ray.serve.status().applications.get(APPLICATION)
    for deployment in application.deployments.values() if application else ():
        lines = [line for line in deployment.message.splitlines() if "Error: " in line and not line.startswith(" ")]
        if lines:
            return lines[-1].strip()
    return ""


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS
    reason = ""
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        except OSError as error:
            reason = str(error)
        time.sleep(0.1)
    raise UserError(
        f"{url}/readyz: does not answer ({reason}); Serve takes service.host and service.port only when it is first started on a "
        "cluster: serve shutdown, or the address it was started with, would work"
    )
