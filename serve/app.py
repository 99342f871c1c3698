"""The Ray Serve application: replicas that answer HTTP requests from the version that the alias names."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.serve
from ray.serve.config import AutoscalingConfig

import recsys
from recsys.config import Config, load_config
from recsys.config.service import ServiceConfig
from recsys.config.verb_settings import refuse_contradictions, unread
from recsys.errors import UserError
from recsys.exports.registry import Registry
from serve.api.gateway import digest_of
from serve.replica import Replica

logger = logging.getLogger("ray.serve")

APPLICATION = "recsys"
REPLICA = "Replica"
REQUESTS = 10_000
"""Requests that Ray Serve lets into one replica at once; far above what the replica's own queue admits, so that only the queue refuses."""

SHUTDOWN_SECONDS = 30
"""Time for a replica that is stopped to answer what it has admitted."""


def build_app(args: dict[str, Any]) -> ray.serve.Application:
    """Build the application for `serve run serve.app:build_app config=FILE section.key=value ...` or the `args` of `serve deploy`.

    Raises:
        UserError: the config is wrong, no token is set, or the alias names no version.
    """
    config = read_arguments(args)
    return build(config, version_in_service(config))


def build(config: Config, version: str) -> ray.serve.Application:
    """Bind the deployment; binding the same config, code and version again does not change a running service.

    Raises:
        UserError: no token is set.
    """
    service = config.service
    token_digest = digest_of(_token(service))
    deployment = ray.serve.deployment(
        name=REPLICA,
        max_ongoing_requests=REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=service.min_replicas,
            max_replicas=service.max_replicas,
            target_ongoing_requests=service.max_batch_size,
        ),
        ray_actor_options={"num_cpus": service.cpus_per_replica},
        user_config={"version": version},
        max_surge_percent=100,
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
        logging_config={"enable_access_log": False},
    )(ray.serve.ingress()(Replica))
    # Without a version, Ray Serve treats a deployment that is bound again as new code. The argument is marked internal, but there is
    # no public one.
    deployment = deployment.options(version=_fingerprint(config, token_digest), _internal=True)
    return deployment.bind(config, token_digest)


def read_arguments(args: dict[str, Any]) -> Config:
    """Read `config` and the `section.key` overrides; values are strings as for `--set`, or values parsed from YAML.

    Raises:
        UserError: a key or a value is wrong.
    """
    overrides = []
    for key, value in args.items():
        if key != "config":
            if value is None or isinstance(value, dict):
                raise UserError(f"{key}: must be a string, number, true or false, or a list")
            overrides.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    config = load_config(args.get("config"), overrides)
    if missed := unread("serve.deploy", config):
        logger.warning("the service does not read %s", ", ".join(missed))
    return config


def version_in_service(config: Config) -> str:
    """Return the version that `service.alias` names.

    Raises:
        UserError: the alias names no version, or a given key contradicts the config that the version was made with.
    """
    registry = Registry.of_service(config)
    version = resolve_alias(registry, config)
    manifest = registry.manifest(version)
    if config.given:
        carried, run = json.loads(registry.read(manifest, "config.json")), manifest.metadata.get("run", "")
        refuse_contradictions(config, carried, f"version {version}", "train and export with it", run)
    return version


def resolve_alias(registry: Registry, config: Config) -> str:
    """Return the version that `service.alias` names.

    Raises:
        UserError: it names no version.
    """
    version = registry.resolve(config.service.alias)
    if version is None:
        raise UserError(
            f"service.alias = '{config.service.alias}': names no version of export {config.served_export} in {config.storage.root}; "
            "publish one by python -m jobs.export"
        )
    return version


def _token(service: ServiceConfig) -> bytes:
    token = os.environ.get(service.token_env, "").strip()
    if not token:
        raise UserError(
            f"the environment variable {service.token_env} (service.token_env) has no token for the service's callers; "
            f'export {service.token_env}="$(openssl rand -hex 32)" before the cluster is started would work'
        )
    return token.encode()


def _fingerprint(config: Config, token_digest: str) -> str:
    """Hash everything that a running replica depends on, except the version it serves."""
    content = hashlib.sha256(f"{ray.__version__} {token_digest}".encode())
    content.update(
        config.model_dump_json(include={"storage": True, "run": {"name", "scratch"}, "export": {"name"}, "service": True}).encode()
    )
    for package in (Path(recsys.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            content.update(path.read_bytes())
    return content.hexdigest()
