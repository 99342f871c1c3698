"""Starts Serve on a running cluster, deploys a version, and waits until it answers."""

import logging
import time
import urllib.request
from typing import Any

import ray.serve

from recsys.config import Config
from recsys.config.service import ServiceConfig
from recsys.errors import UserError
from recsys.launch.head import connect, free_port
from recsys.launch.ray_internals import serve_http_port
from serve.app import APPLICATION, REPLICA, build, version_in_service

ANY_ADDRESS = ("0.0.0.0", "::")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTHY_SECONDS = 60
STATUS_SECONDS = 30

logger = logging.getLogger(__name__)


def roll_out(config: Config) -> dict[str, Any]:
    """Deploy the version that `service.alias` names on the cluster of `RAY_ADDRESS`, and wait until it answers.

    Raises:
        UserError: the version did not start or was refused, or Serve does not answer at the configured address.
    """
    version = version_in_service(config)
    application = build(config, version)
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
        raise UserError(f"{refusals[0]}; version {statuses[0]['version']} keeps serving")
    logger.info("serve: %s answers at %s", version, url)
    return {
        "url": url,
        "version": version,
        "alias": config.service.alias,
        "export": config.served_export,
        "replicas": len(statuses),
    }


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
