"""The config's sections `export` and `service`: publishing versions and answering from them; the other sections are `config.py`'s."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.data_config import Section


class ExportConfig(Section):
    """Publishing an immutable version and moving the aliases. Without a `name` the run's is taken."""

    checkpoint: str = ""
    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    promote: Literal["if_better", "always", "never"] = "if_better"
    num_golden: Annotated[int, Field(ge=0)] = 16


class ServiceConfig(Section):
    """The HTTP endpoint; `token_env` names the variable that holds the bearer token. Without `export` it serves `export.name`."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    export: str = ""
    alias: str = "production"
    token_env: str = "RECSYS_SERVICE_TOKEN"
    max_body_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    max_k: Annotated[int, Field(ge=1)] = 500
    max_candidates: Annotated[int, Field(ge=1)] = 5000
    max_batch_size: Annotated[int, Field(ge=1)] = 32
    batch_wait_seconds: Annotated[float, Field(ge=0)] = 0.002
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 2
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"service.min_replicas = {self.min_replicas} must be at most service.max_replicas = {self.max_replicas}")
        return self
