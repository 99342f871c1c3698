"""The config section `model`: encoders, ranker and losses."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.config.base import Count, Fact, Fraction, NonNegative, Positive, PositiveInt, Section


class TextConfig(Section):
    """The language model over item text.

    With a trained language model and a loss over the whole catalogue, every micro batch encodes all texts; `refresh_steps` avoids that.
    """

    mode: Annotated[Literal["off", "frozen", "lora", "full"], Fact.SEARCHED] = "frozen"
    """`off`: no text; `frozen`: texts are encoded once; `lora`: LoRA adapters are trained; `full`: all weights are trained."""
    backbone: Annotated[str, Fact.PATH_OR_NAME] = "minilm"
    """`minilm`, `tiny`, a name on the Hugging Face Hub, a folder or an `s3://` folder."""
    max_tokens: Annotated[int, Field(ge=4, le=4096)] = 32
    """Maximum number of tokens per text."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """Pooling of token vectors into the text vector."""
    lora_rank: PositiveInt = 8
    """Rank of the LoRA adapters."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters; empty: all."""
    refresh_steps: Count = 0
    """If above 0, only texts in the micro batch are encoded; cached embeddings of all texts are refreshed every this many steps."""


class LossConfig(Section):
    """The retrieval loss over the catalogue."""

    kind: Annotated[Literal["full", "sampled", "gbce", "infonce"], Fact.SEARCHED] = "full"
    """Cross-entropy over all items (with `id_dropout`: those in training), its sampled estimate, calibrated BCE, or in-batch InfoNCE."""
    num_negatives: PositiveInt = 256
    """Negatives that `sampled` and `gbce` draw per step."""
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """Distribution of the negatives; scores are corrected by its log probability."""
    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Strength of the calibration of `gbce` for its number of negatives: 0 none, 1 full."""
    temperature: Positive = 1.0
    """Temperature that scores are divided by."""
    chunk_bytes: Annotated[int, Field(ge=1 << 16)] | None = None
    """Maximum bytes of scores in memory; unset: chosen by device."""

    @model_validator(mode="after")
    def _check_negatives(self) -> Self:
        if self.kind == "gbce" and self.negatives != "uniform":
            raise ValueError(f"model.loss.kind = 'gbce' is calibrated for uniform negatives, not '{self.negatives}'; set uniform")
        return self

    @property
    def draws_negatives(self) -> bool:
        """Return whether the loss samples negatives for each step."""
        return self.kind == "gbce" or (self.kind == "sampled" and self.negatives != "in_batch")


class RankerConfig(Section):
    """How a (user, item) pair is scored for each task."""

    kind: Literal["concatenation", "additive", "regression"] = "concatenation"
    """A network over user, item and product; gated bilinear and text scores; or a regression on the user's past values or labels."""
    num_factors: PositiveInt = 16
    """Number of item factors that `regression` uses."""
    factor_dropout: Fraction = 0.5
    """Dropout on the item vector that the factors are computed from."""
    num_experts: PositiveInt = 1
    """Number of experts that the tasks share; each task mixes them with its own gate."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """Weights of the tasks relative to each other: equal (`fixed`) or learned (`uncertainty`)."""
    task_weight: NonNegative = 0.1
    """Weight of the task losses relative to the retrieval loss."""
    task_weights: dict[str, NonNegative] = {}  # noqa: RUF012 - pydantic copies defaults
    """Weights of single tasks on top of `task_weight`, by name; 1 for the others."""
    needs: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults
    """Tasks that cannot happen without another: `{buy = "click"}` models p(buy) as p(click) x p(buy | click), learned on all exposures."""
    imbalance: Literal["none", "weight", "sample"] = "none"
    """For rare positives: `weight` them, or `sample` the negatives; predicted probabilities are calibrated back."""
    negatives_per_positive: Positive = 1.0
    """Negatives per positive that `sample` keeps."""

    @model_validator(mode="after")
    def _check_needs(self) -> Self:
        if self.needs and self.imbalance != "none":
            raise ValueError("model.ranker.needs works on labels as they are; set model.ranker.imbalance=none")
        return self


class ModelConfig(Section):
    """Architecture of the recommender."""

    width: Annotated[int, Field(ge=4), Fact.SEARCHED] = 64
    """Width of user and item vectors."""
    num_layers: PositiveInt = 2
    """Transformer layers of the user encoder."""
    num_heads: PositiveInt = 2
    """Attention heads of the user encoder."""
    dropout: Annotated[Fraction, Fact.SEARCHED] = 0.2
    """Dropout in the user encoder."""
    attention: Literal["softmax", "hstu", "ligr"] = "softmax"
    """Softmax; SiLU weights with gated output (`hstu`); or softmax with a learned gate on each residual (`ligr`)."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """Positional encoding of the history."""
    use_ids: bool = True
    """Learn an embedding per item id."""
    id_dropout: Fraction = 0.0
    """Share of items whose id embedding is dropped in a step, so that text and features learn to work without it."""
    id_buckets: Count = 0
    """Rows of a hashed id table for large catalogues; 0: one row per item."""
    id_hashes: PositiveInt = 2
    """Rows of the hashed table that are summed into an id embedding."""
    use_features: bool = True
    """Use the catalogue's categories, numbers and pretrained vectors."""
    use_gaps: bool = True
    """Use the time between interactions."""
    use_values: bool = True
    """Use the values (ratings) of past interactions."""
    use_long_term: bool = False
    """Join user states with a moving average of them, so that the model also sees what lasts."""
    use_profiles: bool = False
    """Use the columns of users, which the model reads before the history; a user without history then gets a list by profile."""
    profile_rate: Fraction = 0.5
    """Share of samples of which one target is also predicted from the profile alone."""
    use_contexts: bool = True
    """Use the context of the request: of the event that is predicted in training, of the request in the service."""
    query_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of samples that are also trained with a free-text query, typed by the user or made from the target's text."""
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    ranker: RankerConfig = RankerConfig()

    @property
    def caches_texts(self) -> bool:
        """Return whether training uses cached text embeddings for items outside the micro batch."""
        return self.text.refresh_steps > 0

    @property
    def has_queries(self) -> bool:
        """Return whether the model learns to answer free-text queries."""
        return self.query_rate > 0 and self.text.mode != "off"

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.width % self.num_heads:
            near = self.num_heads * max(1, round(self.width / self.num_heads))
            raise ValueError(f"model.width = {self.width} must be divisible by model.num_heads = {self.num_heads}; {near} would work")
        if not self.use_ids and self.text.mode == "off" and not self.use_features:
            raise ValueError(
                "model.use_ids = false, model.use_features = false and model.text.mode = 'off' leave nothing to encode an item with"
            )
        if self.caches_texts and (self.text.mode not in ("lora", "full") or self.loss.kind != "full"):
            raise ValueError(
                f"model.text.refresh_steps = {self.text.refresh_steps} needs model.text.mode = lora or full, and model.loss.kind = full; "
                "0 would work"
            )
        return self
