"""The config sections `storage` and `run`: where artifacts are stored, and how a run is named and resumed."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from recsys.config.base import Fact, Positive, Section

Stage = Literal["prepare_data", "train", "train_id_only", "search", "evaluate", "export", "serve"]


class StorageConfig(Section):
    """Where artifacts are stored. Credentials come from the AWS credential chain only."""

    root: Annotated[str, Fact.PATH] = "store"
    """A local folder or `s3://bucket/prefix`."""
    endpoint: str | None = None
    """URL of an S3-compatible server; unset: AWS."""
    region: str = "us-east-1"
    """S3 region."""


class RunConfig(Section):
    """The run's name, how it resumes, its local folder and its trackers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")] = "default"
    """Name that the run is submitted and resumed under."""
    scratch: Annotated[str, Fact.PATH] = "scratch"
    """Local folder for temporary files, caches and logs."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto` resumes from the newest checkpoint if there is one, `must` refuses to start a new run, `never` refuses to resume."""
    lease_seconds: Positive = 30.0
    """Seconds after which another machine's lease on the run expires if it is not renewed."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """Stages of `jobs.pipeline`, in this order."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Experiment trackers that receive the run's metrics."""
    project: str = "recsys"
    """Project or experiment name in the trackers."""
