"""The config tree, how it is loaded from TOML and `--set`, and one-line messages for errors in it."""

import difflib
import json
import logging
import tomllib
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import PrivateAttr, ValidationError, model_validator

from recsys.config.base import ANY, Fact, Section, fields_of, leaves, section_of
from recsys.config.data import DataConfig
from recsys.config.evaluation import EvaluationConfig, SearchConfig
from recsys.config.model import ModelConfig
from recsys.config.ranking import RankingConfig
from recsys.config.service import ExportConfig, LoadConfig, ServiceConfig
from recsys.config.storage import RunConfig, StorageConfig
from recsys.config.training import CheckpointConfig, FairnessConfig, OptimizerConfig, PretrainingConfig, TrainingConfig
from recsys.errors import UserError

logger = logging.getLogger(__name__)


class Config(Section):
    """One config for every stage; each stage reads the sections that it needs."""

    storage: Annotated[StorageConfig, Fact.MAY_CHANGE] = StorageConfig()
    run: Annotated[RunConfig, Fact.MAY_CHANGE] = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    fairness: FairnessConfig = FairnessConfig()
    pretraining: PretrainingConfig = PretrainingConfig()
    checkpoint: Annotated[CheckpointConfig, Fact.MAY_CHANGE] = CheckpointConfig()
    ranking: RankingConfig = RankingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: Annotated[SearchConfig, Fact.MAY_CHANGE] = SearchConfig()
    export: Annotated[ExportConfig, Fact.MAY_CHANGE] = ExportConfig()
    service: Annotated[ServiceConfig, Fact.MAY_CHANGE] = ServiceConfig()
    load: Annotated[LoadConfig, Fact.MAY_CHANGE] = LoadConfig()

    _given: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def given(self) -> frozenset[str]:
        """Return the keys given in a file or on the command line; the others are defaults or were adopted from a dataset or checkpoint."""
        return self._given

    @model_validator(mode="before")
    @classmethod
    def _read_former_keys(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return with_present_keys(tree)

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        bad = [width for width in self.search.width if width % self.model.num_heads]
        if bad:
            raise ValueError(
                f"search.width = {list(self.search.width)}: {bad[0]} must be divisible by model.num_heads = {self.model.num_heads}"
            )
        if self.training.shuffle_histories and self.model.use_gaps:
            raise ValueError("training.shuffle_histories = true removes the times between interactions; set model.use_gaps=false")
        return self

    @property
    def export_name(self) -> str:
        """Return the name that versions are published under."""
        return self.export.name or self.run.name.replace("/", ".")

    @property
    def served_export(self) -> str:
        """Return the name of the export that the service serves."""
        return self.service.export or self.export_name

    def as_given(self, keys: frozenset[str]) -> "Config":
        """Return a copy with `given` set to these keys."""
        copy = self.model_copy()
        copy._given = keys
        return copy

    def with_values(self, values: dict[str, Any]) -> "Config":
        """Return a copy with the values of `{"section.key": value}` replaced, validated as a whole.

        Raises:
            UserError: a key is unknown or a value is invalid.
        """
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            _put(tree, key, value)
        return _validate(tree, self.given)


_REMOVED_FROM_SERVICE = ("batch_wait_seconds", "ingress_replicas")


def with_present_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config tree with the keys and baselines of earlier releases renamed to their current names, and without removed keys."""
    if isinstance(service := tree.get("service"), dict):
        tree = {**tree, "service": {key: value for key, value in service.items() if key not in _REMOVED_FROM_SERVICE}}
    evaluation = tree.get("evaluation")
    if not isinstance(evaluation, dict):
        return tree
    present = {"fairness_curve" if key == "curve" else key: value for key, value in evaluation.items()}
    if isinstance(present.get("baselines"), (list, tuple)):
        present["baselines"] = [name.replace("factorisation", "factorization") for name in map(str, present["baselines"])]
    return {**tree, "evaluation": present}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load a TOML file, apply `section.key=value` overrides, validate, and make local paths absolute.

    Raises:
        UserError: the file cannot be read, a key is unknown or a value is invalid; the message is one line.
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
    for key in (f"service.{name}" for name in _REMOVED_FROM_SERVICE if name in tree.get("service", ())):
        logger.warning("%s has no effect any more and can be removed", key)
    tree = with_present_keys(tree)
    return _with_absolute_paths(_validate(tree, frozenset(key for key, _ in leaves(tree))))


def _parse_value(text: str) -> Any:
    """Parse a TOML value; text that is not TOML is a plain string."""
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
        raise UserError(_explain(error)) from None
    return config.as_given(given)


def _explain(error: ValidationError) -> str:
    """Return one line about the first error: key, value, rule, and the closest known key."""
    first = error.errors()[0]
    key, value = ".".join(str(part) for part in first["loc"]), json.dumps(first["input"], default=str)
    fields = {known: field for known, field, _ in fields_of(Config)}
    for table in [known.removesuffix(f".{ANY}") for known in fields if known.endswith(f".{ANY}")]:
        depth = table.count(".") + 2
        if key.startswith(f"{table}."):
            own = ".".join(str(part) for part in first["loc"][:depth])
            fields |= {
                known.replace(f"{table}.{ANY}", own, 1): field for known, field in fields.items() if known.startswith(f"{table}.{ANY}")
            }
    if first["type"] == "extra_forbidden":
        section, _, name = key.rpartition(".")
        siblings = {known.rpartition(".")[2]: known for known in fields if known.rpartition(".")[0] == section}
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.0)
        return f"{key}: unknown key; did you mean {siblings[close[0]]}?"
    if first["type"] == "value_error":
        is_setting = key in fields and section_of(fields[key]) is None
        return f"{key} = {value}: {first['ctx']['error']}" if is_setting else str(first["ctx"]["error"])
    while "." in key and key not in fields:  # drop list positions and names of alternatives
        key = key.rpartition(".")[0]
    return f"{key} = {value}: {first['msg']}"


def _with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers and jobs run in other folders."""
    values: dict[str, Any] = {}
    for key, _, facts in fields_of(Config):
        if facts.isdisjoint((Fact.PATH, Fact.PATH_OR_NAME)):
            continue
        value = attrgetter(key)(config)
        if not isinstance(value, str):
            values[key] = [_absolute(path) for path in value]
        elif value and (Fact.PATH in facts or Path(value).is_dir()):
            values[key] = _absolute(value)
    return config.with_values(values)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
