"""The config sections `export`, `service` and `load`: publishing versions, serving them, and measuring the service."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.config.base import Count, Fact, Positive, PositiveInt, Section


class ExportConfig(Section):
    """Publishing an immutable version and moving the aliases."""

    checkpoint: Annotated[str, Fact.PATH] = ""
    """Checkpoint to export, as printed by `jobs.train` or `tune.search`."""
    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    """Name that versions are published under; empty: the run's name."""
    promote: Literal["if_no_worse", "if_better", "always", "never"] = "if_no_worse"
    """When `production` moves to the new version. Both are evaluated on the same users; no worse: the 95 % interval reaches 0."""
    num_golden: Count = 16
    """Number of users whose recommendations are stored with the version; every replica must reproduce them before it serves."""


class ServiceConfig(Section):
    """The HTTP endpoint."""

    proxy: Literal["haproxy", "ray"] = "haproxy"
    """HTTP proxy of a head that is started on this machine; a cluster has the proxy that its nodes' environment chooses."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: a free one."""
    export: str = ""
    """Name of the export to serve; empty: `export.name`."""
    alias: str = "production"
    """Alias of the version to serve."""
    token_env: str = "RECSYS_SERVICE_TOKEN"
    """Environment variable with the bearer token."""
    live: Literal["embedded", "redis", "off"] = "embedded"
    """Where events since the export are kept: in a file on the cluster's head, in a Redis server, or nowhere."""
    redis_env: str = "RECSYS_REDIS_URL"
    """Environment variable with the address of the Redis server, on every node."""
    docs: bool = True
    """Whether /docs shows a page of the API."""
    max_body_bytes: PositiveInt = 1_000_000
    """Largest request body."""
    max_k: PositiveInt = 500
    """Largest `limit` of a request."""
    max_candidates: PositiveInt = 5000
    """Largest number of candidates of a request."""
    max_batch_size: PositiveInt = 32
    """Maximum number of requests per batch."""
    max_batch_cost: PositiveInt = 20_000
    """Maximum cost of a batch: places of histories and candidates."""
    max_batch_seconds: Positive = 2.0
    """A version is refused if it needs longer than this for a batch of the last requests."""
    max_wait_seconds: Positive = 0.25
    """A request is refused if those before it in the queue take longer than this."""
    min_replicas: PositiveInt = 1
    """Smallest number of replicas."""
    max_replicas: PositiveInt = 2
    """Largest number of replicas."""
    cpus_per_replica: Positive = 1
    """CPUs that Ray reserves per replica."""
    request_timeout_seconds: Positive = 10.0
    """A request that takes longer than this is answered with an error."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"service.min_replicas = {self.min_replicas} must be at most service.max_replicas = {self.max_replicas}")
        return self


class LoadConfig(Section):
    """A load test of the service."""

    url: str = ""
    """Address of the service; empty: `service.host` and `service.port`."""
    clients: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8, 32, 64)
    """Numbers of simultaneous clients; each is measured on its own."""
    seconds: Positive = 5.0
    """Duration of each measurement."""
    rate: Annotated[float, Field(ge=0)] = 0.0
    """Requests per second that all clients together send, whether or not answers arrive; 0: each client sends when it has its answer."""
    num_users: PositiveInt = 1000
    """Users of the served export whose lists are asked for in turn."""
    limit: PositiveInt = 10
    """Number of items per list."""
