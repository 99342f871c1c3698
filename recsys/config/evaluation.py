"""The config sections `evaluation` and `search`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.config.base import Fact, Fraction, PositiveInt, Section

BaselineName = Literal[
    "popularity", "recent_popularity", "item_knn", "bpr", "matrix_factorization", "factorization_machine", "two_tower", "sasrec"
]


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
    cutoffs: Annotated[tuple[PositiveInt, ...], Fact.MAY_CHANGE] = (5, 10, 20)
    """Values of k in metrics such as `ndcg@k`."""
    metric: str = "ndcg@10"
    """Metric that chooses checkpoints, trials and exports: hr, ndcg, mrr or recall at one of `cutoffs`."""
    batch_size: Annotated[PositiveInt, Fact.MAY_CHANGE] = 256
    """Users per scoring batch."""

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
