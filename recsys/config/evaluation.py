"""The config sections `evaluation` and `search`."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from recsys.config.base import Fact, Fraction, PositiveInt, Section, leaves
from recsys.metric_names import LIST_METRICS, RANKING_METRICS, SHARE_SUFFIX, TASK_METRICS, is_lower_better, oriented

BaselineName = Literal[
    "popularity",
    "recent_popularity",
    "item_knn",
    "bpr",
    "matrix_factorization",
    "factorization_machine",
    "two_tower",
    "sasrec",
    "content_tfidf",
    "content_minilm",
    "hybrid",
    "din",
    "dcn",
]


def _flatten(value: Any) -> Any:
    """Return `{"click.auc": x}` also for the nested tables that `--set evaluation.guards.click.auc=x` gives."""
    return dict(leaves(value)) if isinstance(value, dict) else value


Guards = Annotated[dict[str, float], BeforeValidator(_flatten)]


class EvaluationConfig(Section):
    """Full ranking: every item of the catalogue is a candidate except those that the user has seen."""

    checkpoint: Annotated[str, Fact.PATH, Fact.MAY_CHANGE] = ""
    """Checkpoint to evaluate, as printed by `jobs.train`."""
    compare: Annotated[str, Fact.PATH, Fact.MAY_CHANGE] = ""
    """Another checkpoint to compare with by a paired significance test."""
    fairness_curve: Annotated[tuple[str, ...], Fact.PATH, Fact.MAY_CHANGE] = ()
    """Checkpoints trained with other `fairness` bounds, for a curve of quality against the gap between groups."""
    baselines: Annotated[tuple[BaselineName, ...], Fact.MAY_CHANGE] = ("popularity",)
    """Baselines to fit on the same data and evaluate in the same way; `popularity` is always included."""
    baseline_epochs: Annotated[PositiveInt, Fact.MAY_CHANGE] = 20
    """Epochs of the baselines that are trained by gradient descent."""
    fairness_attributes: Annotated[tuple[str, ...], Fact.MAY_CHANGE] = ()
    """User attributes whose groups are compared; empty: all with few values."""
    diversity: Annotated[tuple[Fraction, ...], Fact.MAY_CHANGE] = ()
    """Diversity weights to re-rank with, for a curve of quality against diversity."""
    diversity_method: Annotated[Literal["mmr", "dpp"], Fact.MAY_CHANGE] = "mmr"
    """Re-ranking by maximal marginal relevance or by a determinantal point process."""
    split: Annotated[Literal["validation", "test"], Fact.MAY_CHANGE] = "test"
    """Split to evaluate on."""
    target_events: tuple[str, ...] = ()
    """Event kinds that are targets; empty: all positive kinds."""
    repeats: Literal["exclude", "include", "new_kind"] = "exclude"
    """Targets on items that the user has seen: they do not count, they count, or only with a stronger event than before."""
    cutoffs: Annotated[tuple[PositiveInt, ...], Fact.MAY_CHANGE] = (5, 10, 20)
    """Values of k in metrics such as `ndcg@k`."""
    metric: str = "ndcg@10"
    """Metric that chooses checkpoints, trials and exports: of lists at one of `cutoffs` (`ndcg@10`), or of a task (`click.auc`)."""
    guards: Guards = {}  # noqa: RUF012 - pydantic copies defaults
    """Other metrics and the change for the worse that is still allowed, such as `{"click.auc" = -0.002}`."""
    batch_size: Annotated[PositiveInt, Fact.MAY_CHANGE] = 256
    """Users per scoring batch."""

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        for key, metric in (("metric", self.metric), *(("guards", name) for name in self.guards)):
            if not self._is_metric(metric):
                known = ", ".join(f"ndcg@{k}" for k in self.cutoffs)
                raise ValueError(
                    f"evaluation.{key} = '{metric}' must be {', '.join(RANKING_METRICS + LIST_METRICS)} at one of evaluation.cutoffs, or "
                    f"{', '.join(TASK_METRICS)} of a task; {known}, click.auc would work"
                )
        for name, change in self.guards.items():
            if not math.isfinite(change) or oriented(change, name) > 0:
                better = "lower" if is_lower_better(name) else "higher"
                raise ValueError(f"evaluation.guards: {name} = {change} is an improvement, as {better} is better; {-change:g} would work")
        return self

    def _is_metric(self, metric: str) -> bool:
        task, _, measure = metric.rpartition(".")
        name, _, cutoff = metric.partition("@")
        is_name = name in RANKING_METRICS + LIST_METRICS or name.endswith(SHARE_SUFFIX)
        is_of_lists = is_name and cutoff.isdigit() and int(cutoff) in self.cutoffs
        return is_of_lists or (bool(task) and measure in TASK_METRICS)

    @property
    def ranking_metric(self) -> str:
        """Return `metric` or, if it is not a mean of users' ranks, `ndcg` at 10 or the first cutoff: for slices, groups and curves."""
        if self.metric.partition("@")[0] in RANKING_METRICS:
            return self.metric
        return f"ndcg@{10 if 10 in self.cutoffs else self.cutoffs[0]}"


class SearchConfig(Section):
    """Hyperparameter search: Optuna proposes trials, ASHA stops weak ones, and each trial is a full training run."""

    num_trials: PositiveInt = 4
    """Number of trials."""
    max_concurrent: PositiveInt | None = None
    """Maximum number of concurrent trials; unset: as many as fit on the cluster."""
    grace_epochs: PositiveInt = 2
    """Epochs before ASHA may stop a trial."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """ASHA keeps one in this many trials at each rung."""
    learning_rate: tuple[float, float] = (3e-4, 5e-3)
    """Range `[low, high]` of `optimizer.learning_rate`, searched on a log scale."""
    width: tuple[int, ...] = (32, 64)
    """Values of `model.width`."""
    dropout: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Values of `model.dropout`."""
    loss: tuple[Literal["full", "sampled"], ...] = ("full", "sampled")
    """Values of `model.loss.kind`."""
    text_mode: tuple[Literal["off", "frozen", "lora", "full"], ...] = ("off", "frozen")
    """Values of `model.text.mode`."""
    seed: int = 0
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.learning_rate
        if not 0 < low < high:
            raise ValueError(f"search.learning_rate = [{low}, {high}] must be [low, high] with 0 < low < high; [0.0003, 0.005] would work")
        return self
