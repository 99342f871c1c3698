"""The config's section `model`: encoders, ranker and losses."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.config.base import Count, Fact, Fraction, NonNegative, Positive, PositiveInt, Section


class TextConfig(Section):
    """The language model over item text.

    A trained one runs, for a loss over the whole catalogue, over all texts in every micro batch; `refresh_steps` avoids that.
    """

    mode: Annotated[Literal["off", "frozen", "lora", "full"], Fact.SEARCHED] = "frozen"
    """No text, text encoded once, LoRA adapters trained, or all weights trained."""
    backbone: Annotated[str, Fact.PATH_OR_NAME] = "minilm"
    """`minilm`, `tiny`, a name on the hub, a folder or an `s3://` folder."""
    max_tokens: Annotated[int, Field(ge=4, le=4096)] = 32
    """Maximum number of tokens that are read of a text."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """Pooling of token vectors into the text vector."""
    lora_rank: PositiveInt = 8
    """Rank of LoRA adapters."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters; empty: all."""
    refresh_steps: Count = 0
    """If above 0, the language model runs over the texts of the micro batch only; cached vectors of the others are refreshed this often."""


class LossConfig(Section):
    """The retrieval loss over the catalogue."""

    kind: Annotated[Literal["full", "sampled", "gbce", "infonce"], Fact.SEARCHED] = "full"
    """Cross-entropy over all items (with `id_dropout`: those in training), its sampled estimate, calibrated BCE, or in-batch InfoNCE."""
    num_negatives: PositiveInt = 256
    """Negatives that `sampled` and `gbce` draw per step."""
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """Distribution of the negatives; scores are corrected by its log probability."""
    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    """How far `gbce` calibrates the positive probability for its negatives: 0 not at all, 1 fully."""
    temperature: Positive = 1.0
    """Scores are divided by this."""
    chunk_bytes: Annotated[int, Field(ge=1 << 16)] | None = None
    """Bytes of scores in memory at once; unset: chosen by device."""

    @model_validator(mode="after")
    def _check_negatives(self) -> Self:
        if self.kind == "gbce" and self.negatives != "uniform":
            raise ValueError(f"model.loss.kind = 'gbce' is calibrated for uniform negatives, not '{self.negatives}'; set uniform")
        return self

    @property
    def draws_negatives(self) -> bool:
        """Return whether the loss compares with items that are drawn for each step."""
        return self.kind == "gbce" or (self.kind == "sampled" and self.negatives != "in_batch")


class RankerConfig(Section):
    """How a (user, item) pair is scored for each task."""

    kind: Literal["concatenation", "additive", "regression"] = "concatenation"
    """A network over user, item and product; gated bilinear and text scores; or, for values, a regression on each user's past values."""
    num_factors: PositiveInt = 16
    """Factors of an item that `regression` regresses on."""
    factor_dropout: Fraction = 0.5
    """Dropout of the item vector that the factors are made of."""
    num_experts: PositiveInt = 1
    """Experts that the tasks share, mixed by a gate per task."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """Weights of the tasks among each other: equal, or learned."""
    task_weight: NonNegative = 0.1
    """Weight of the tasks beside the retrieval loss."""
    imbalance: Literal["none", "weight", "sample"] = "none"
    """Rare positives get weight, or negatives are sampled; probabilities are calibrated back."""
    negatives_per_positive: Positive = 1.0
    """Negatives per positive that `sample` keeps."""


class ModelConfig(Section):
    """The recommender's shape."""

    width: Annotated[int, Field(ge=4), Fact.SEARCHED] = 64
    """Width of user and item vectors."""
    num_layers: PositiveInt = 2
    """Transformer layers of the user encoder."""
    num_heads: PositiveInt = 2
    """Attention heads of the user encoder."""
    dropout: Annotated[Fraction, Fact.SEARCHED] = 0.2
    """Dropout in the user encoder."""
    attention: Literal["softmax", "hstu", "ligr"] = "softmax"
    """Softmax; SiLU weights with gated output (HSTU); or softmax with a learned gate on each residual (LiGR)."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """Encoding of positions in a history."""
    use_ids: bool = True
    """Learn a vector per item id."""
    id_dropout: Fraction = 0.0
    """Share of items whose id vector is dropped in a step, so that text and features learn to stand alone."""
    id_buckets: Count = 0
    """Rows of a hashed id table for large catalogues; 0: one row per item."""
    id_hashes: PositiveInt = 2
    """Rows of the hashed table that make up an id's vector."""
    use_features: bool = True
    """Use categories, numbers and given vectors of the catalogue."""
    use_gaps: bool = True
    """Use the time between interactions."""
    use_values: bool = True
    """Use the values (ratings) of past interactions."""
    query_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of samples that are also predicted with a free-text query, typed by the user or taken from the target's text."""
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    ranker: RankerConfig = RankerConfig()

    @property
    def keeps_texts(self) -> bool:
        """Return whether training caches the vectors of texts outside the micro batch."""
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
                "model.use_ids = false, model.use_features = false and model.text.mode = 'off' leave nothing to encode an item by"
            )
        if self.keeps_texts and (self.text.mode not in ("lora", "full") or self.loss.kind != "full"):
            raise ValueError(
                f"model.text.refresh_steps = {self.text.refresh_steps} needs model.text.mode = lora or full, and model.loss.kind = full; "
                "0 would work"
            )
        return self
