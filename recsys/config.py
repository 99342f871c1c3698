"""The whole config tree: frozen, read from TOML and `--set`, every key and every pair of keys checked before any work."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from recsys.config_errors import explain
from recsys.data_config import DataConfig, Fraction, Section
from recsys.errors import UserError
from recsys.model_config import ModelConfig
from recsys.service_config import ExportConfig, ServiceConfig

BaselineName = Literal[
    "popularity", "recent_popularity", "item_knn", "bpr", "matrix_factorisation", "factorisation_machine", "two_tower", "sasrec"
]
Workers = Annotated[int, Field(ge=1)]
Stage = Literal["prepare_data", "train", "train_id_only", "search", "evaluate", "export", "serve"]


class StorageConfig(Section):
    """Where every artifact lives: a folder, or `s3://bucket/prefix`. Credentials come from the AWS chain alone."""

    root: str = "store"
    endpoint: str | None = None
    region: str = "us-east-1"


class RunConfig(Section):
    """The name that a run is submitted and resumed under, and what is local to it.

    A run with checkpoints goes on from the newest: `resume = "never"` refuses that, `"must"` refuses to start anew. An owner on another
    machine that gave no sign of life for `lease_seconds` is taken for dead. Each of `trackers` is sent the run's numbers, under `project`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")] = "default"
    scratch: str = "scratch"
    resume: Literal["auto", "must", "never"] = "auto"
    lease_seconds: Annotated[float, Field(gt=0)] = 30.0
    stages: tuple[Stage, ...] = get_args(Stage)
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    project: str = "recsys"


class OptimizerConfig(Section):
    """AdamW, linear warm-up, cosine decay to `final_fraction` of the peak."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    backbone_learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class TrainingConfig(Section):
    """How a run is spread over workers, what it keeps in memory, how its samples are read, and how long it goes on.

    `offload_optimizer` keeps the optimizer's state in the host's memory and steps there, `offload_parameters` (ZeRO-3) also the weights;
    `recompute_activations` keeps the inputs of the Transformers' layers alone.

    Samples are shuffled within windows of `shuffle_row_groups` row groups of each of the dataset's streams; 0 keeps the shards' order.
    At most `prefetch_bytes` are read ahead; what came from S3 is kept on disk up to `cache_bytes` per node. With `shuffle_histories` each
    epoch sees a sample's interactions in another order: what is predicted is then any of a user's items from any others, as in a split
    that knows no time. A run is started again after a failure, but not after more than `max_failures` without a new checkpoint between;
    a worker whose step takes longer than `hang_seconds` counts as failed. A loss that is not finite ends the run (`on_non_finite` is
    `stop`) or has it go back to its newest checkpoint, to try the step again once (`roll_back`) or to leave its samples out (`skip`).

    `num_workers = [least, most]` takes as many workers as the cluster has at the moment, and starts again with more or fewer when that
    changes. The global batch stays what it is; `micro_batch_size` is then the most that a micro batch holds. Of so many steps as
    `profile_steps` says, the first worker writes down where their time goes.
    """

    num_workers: Workers | tuple[Workers, Workers] = 2
    use_gpu: bool = False
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    recompute_activations: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    micro_batch_size: Annotated[int, Field(ge=1)] = 64
    epochs: Annotated[int, Field(ge=1)] = 20
    max_steps: Annotated[int, Field(ge=1)] | None = None
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = 5
    shuffle_row_groups: Annotated[int, Field(ge=0)] = 2
    shuffle_histories: bool = False
    prefetch_bytes: Annotated[int, Field(ge=0)] = 16 << 20
    cache_bytes: Annotated[int, Field(ge=0)] = 8 << 30
    max_failures: Annotated[int, Field(ge=0)] = 3
    hang_seconds: Annotated[float, Field(gt=0)] = 600.0
    on_non_finite: Literal["stop", "roll_back", "skip"] = "roll_back"
    log_every_seconds: Annotated[float, Field(ge=0)] = 5.0
    profile_steps: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"training.num_workers = [{self.min_workers}, {self.max_workers}] must be [least, most]; "
                f"[{self.max_workers}, {self.min_workers}] would work"
            )
        if self.global_batch_size < self.max_workers:
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size} must have a sample for each of training.num_workers = "
                f"{self.max_workers}; {self.max_workers} would work"
            )
        share = self.micro_batch_size * self.max_workers
        if not self.is_elastic and self.global_batch_size % share:
            near = share * math.ceil(self.global_batch_size / share)
            raise ValueError(
                f"training.global_batch_size = {self.global_batch_size} must be divisible by training.micro_batch_size x "
                f"training.num_workers = {self.micro_batch_size} x {self.max_workers}; {near} would work"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("training.offload_optimizer = true needs training.zero_stage >= 1; 2 would work")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError("training.offload_parameters = true needs training.zero_stage = 3")
        return self

    @property
    def min_workers(self) -> int:
        """The least workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Tell whether the number of workers follows the cluster's size."""
        return self.min_workers < self.max_workers

    def accumulation_steps(self, world_size: int) -> int:
        """Micro batches that each of `world_size` workers runs for one optimizer step."""
        return math.ceil(self.global_batch_size / (self.micro_batch_size * world_size))


class FairnessConfig(Section):
    """A bound, held in training, on how far any group of a user attribute may fall behind in `evaluation.metric`.

    `max_gap` is a share of the mean over the validation users. Without an `attribute` there is no bound. `dual_rate` is how much weight
    a group gains per epoch for each whole mean that it lies beyond the bound. Groups too small to be compared gain none. Which epoch is
    kept depends on the metric of all users alone.
    """

    attribute: str = ""
    max_gap: Annotated[float, Field(ge=0)] = 0.0
    dual_rate: Annotated[float, Field(gt=0)] = 0.5


class PretrainingConfig(Section):
    """What the language model learns from the catalogue alone, before any label; `training` and `optimizer` say how.

    `masked` predicts hidden tokens (of a decoder: the next token), `contrastive` tells the texts of items that the same users took one
    after the other from those of other items; `window` is how many interactions apart two such items may be. All weights of
    `model.text.backbone` learn, at `optimizer.backbone_learning_rate`, whatever `model.text.mode` is.
    """

    objectives: Annotated[tuple[Literal["masked", "contrastive"], ...], Field(min_length=1)] = ("masked", "contrastive")
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    temperature: Annotated[float, Field(gt=0)] = 0.05
    window: Annotated[int, Field(ge=1)] = 3


class CheckpointConfig(Section):
    """When a resumable state is saved, and how many are kept beside the best."""

    every_steps: Annotated[int, Field(ge=1)] = 200
    keep_last: Annotated[int, Field(ge=1)] = 2


class EvaluationConfig(Section):
    """Full ranking: every item of the catalogue is a candidate but those the user has seen.

    `baselines` are fitted on the same training data and ranked in the same way. `compare` is another checkpoint, for a paired test.
    `fairness_attributes` are the user attributes whose groups are compared; empty: all with few values. `diversity` re-ranks by each
    of its weights, for a curve of quality against diversity. `curve` are other checkpoints, trained under other bounds of `fairness`,
    for a curve of quality against the gap between groups.
    """

    checkpoint: str = ""
    compare: str = ""
    curve: tuple[str, ...] = ()
    baselines: tuple[BaselineName, ...] = ("popularity",)
    baseline_epochs: Annotated[int, Field(ge=1)] = 20
    fairness_attributes: tuple[str, ...] = ()
    diversity: tuple[Fraction, ...] = ()
    diversity_method: Literal["mmr", "dpp"] = "mmr"
    split: Literal["validation", "test"] = "test"
    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = (5, 10, 20)
    metric: str = "ndcg@10"
    batch_size: Annotated[int, Field(ge=1)] = 256

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        name, _, cutoff = self.metric.partition("@")
        if name not in ("hr", "ndcg", "mrr", "recall") or not cutoff.isdigit() or int(cutoff) not in self.cutoffs:
            known = ", ".join(f"ndcg@{k}" for k in self.cutoffs)
            raise ValueError(
                f"evaluation.metric = '{self.metric}' must be hr, ndcg, mrr or recall at one of evaluation.cutoffs; {known} would work"
            )
        return self


class SearchConfig(Section):
    """The hyperparameter search: Optuna proposes, ASHA stops, every trial is a whole training run."""

    num_trials: Annotated[int, Field(ge=1)] = 4
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    grace_epochs: Annotated[int, Field(ge=1)] = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    learning_rate: tuple[float, float] = (3e-4, 5e-3)
    width: tuple[int, ...] = (32, 64)
    dropout: tuple[float, ...] = (0.1, 0.2, 0.4)
    loss: tuple[Literal["full", "sampled"], ...] = ("full", "sampled")
    text_mode: tuple[Literal["off", "frozen", "lora", "full"], ...] = ("off", "frozen")
    seed: int = 0

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.learning_rate
        if not 0 < low < high:
            raise ValueError(f"search.learning_rate = [{low}, {high}] must be [low, high] with 0 < low < high; [0.0003, 0.005] would work")
        return self


class Config(Section):
    """One config for every stage; each stage reads the sections that it needs."""

    storage: StorageConfig = StorageConfig()
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    fairness: FairnessConfig = FairnessConfig()
    pretraining: PretrainingConfig = PretrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig = SearchConfig()
    export: ExportConfig = ExportConfig()
    service: ServiceConfig = ServiceConfig()

    _given: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def given(self) -> frozenset[str]:
        """The keys that a file or the command line gave; the others have their default or were adopted."""
        return self._given

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        bad = [width for width in self.search.width if width % self.model.num_heads]
        if bad:
            raise ValueError(
                f"search.width = {list(self.search.width)}: {bad[0]} must be divisible by model.num_heads = {self.model.num_heads}"
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.training.shuffle_histories and self.model.use_gaps:
            raise ValueError("training.shuffle_histories = true leaves no time between interactions to learn; set model.use_gaps=false")
        return self

    @property
    def export_name(self) -> str:
        """The name that versions are published under."""
        return self.export.name or self.run.name.replace("/", ".")

    @property
    def served_export(self) -> str:
        """The export name that the service answers from."""
        return self.service.export or self.export_name

    def as_given(self, keys: frozenset[str]) -> "Config":
        """Return a copy for which these keys were given."""
        copy = self.model_copy()
        copy._given = keys
        return copy

    def with_values(self, values: dict[str, Any]) -> "Config":
        """Return a copy with `{"section.key": value}` replaced, checked as a whole.

        Raises:
            UserError: a key is unknown or a value breaks a rule.
        """
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            _put(tree, key, value)
        return _validate(tree, self.given)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, lay `section.key=value` over it, check all, and make local paths absolute.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value breaks a rule; one line.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config {path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path}: is not valid TOML: {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or "." not in key:
            raise UserError(f"--set {override}: must be section.key=value, such as --set training.epochs=3")
        _put(tree, key, _parse_value(text))
    return _with_absolute_paths(_validate(tree, frozenset(_keys(tree))))


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else (f"{prefix}{key}",)


def _parse_value(text: str) -> Any:
    """Read a value as TOML would; what is not TOML is a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: '{parent}' is a value, not a section")
    tree[last] = value


def _validate(tree: dict[str, Any], given: frozenset[str]) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Config)) from None
    return config.as_given(given)


def _with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers and jobs run in folders of their own."""
    values = {
        "storage.root": config.storage.root,
        "run.scratch": config.run.scratch,
        "data.folder": config.data.folder,
        "data.events": config.data.events,
        "data.items": config.data.items,
        "data.users": config.data.users,
        "data.base": config.data.base,
        "data.dataset": config.data.dataset,
        "evaluation.checkpoint": config.evaluation.checkpoint,
        "evaluation.compare": config.evaluation.compare,
        "export.checkpoint": config.export.checkpoint,
    }
    if Path(config.model.text.backbone).is_dir():
        values["model.text.backbone"] = config.model.text.backbone
    absolute: dict[str, Any] = {key: _absolute(path) for key, path in values.items() if path}
    return config.with_values({**absolute, "evaluation.curve": [_absolute(path) for path in config.evaluation.curve]})


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
