"""The config's section `model`: encoders, ranker and losses; the other sections are `config.py`'s."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from recsys.data_config import Fraction, Section


class TextConfig(Section):
    """The language model over item text: `minilm`, `tiny`, a hub name, a folder or an `s3://` folder.

    In mode `lora` adapters of `lora_rank` are added to the linear layers named `lora_targets`; none named: to all.

    One that is trained runs, for a loss over the whole catalogue, over all texts in every micro batch. With `refresh_steps` it runs over
    those of its histories and targets alone: the others' vectors are those of the last refresh, which comes every so many steps.
    """

    mode: Literal["off", "frozen", "lora", "full"] = "frozen"
    backbone: str = "minilm"
    max_tokens: Annotated[int, Field(ge=4, le=4096)] = 32
    pooling: Literal["mean", "first", "last"] = "mean"
    lora_rank: Annotated[int, Field(ge=1)] = 8
    lora_targets: tuple[str, ...] = ()
    refresh_steps: Annotated[int, Field(ge=0)] = 0


class LossConfig(Section):
    """The retrieval loss over the catalogue.

    `full`: cross-entropy over every item, or with `model.id_dropout` over those that training saw. `sampled`: the same estimated from
    `num_negatives` draws, corrected by their probability. `gbce`: binary cross-entropy whose positive probability is calibrated for
    `num_negatives` uniform draws by `calibration` (0: none, 1: whole). `infonce`: cross-entropy against the other targets of the global
    batch alone. Scores are divided by `temperature`; at most `chunk_bytes` of them are held at once, by default as many as suit the device.
    """

    kind: Literal["full", "sampled", "gbce", "infonce"] = "full"
    num_negatives: Annotated[int, Field(ge=1)] = 256
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    temperature: Annotated[float, Field(gt=0)] = 1.0
    chunk_bytes: Annotated[int, Field(ge=1 << 16)] | None = None

    @model_validator(mode="after")
    def _check_negatives(self) -> Self:
        if self.kind == "gbce" and self.negatives != "uniform":
            raise ValueError(f"model.loss.kind = 'gbce' is calibrated for uniform negatives, not '{self.negatives}'; set uniform")
        return self

    @property
    def draws_negatives(self) -> bool:
        """Tell whether the loss compares with items that are drawn for each step."""
        return self.kind == "gbce" or (self.kind == "sampled" and self.negatives != "in_batch")


class RankerConfig(Section):
    """How a (user, item) pair is scored for each task.

    `concatenation` runs a network over user, item and their product. `additive` is a bilinear score of user and item plus
    gate_text x (user . item text) plus gate_sequence x (history . item), each gate learned per task. `regression` scores the tasks that
    are made of values, such as ratings, by `num_factors` of the item on which the user's values so far are regressed, and the others as
    `concatenation` does; `factor_dropout` hides entries of the item's vector from them. With `num_experts` above 1 the tasks share
    experts, mixed by a gate per task. `task_weight` is the tasks' weight beside retrieval; with `uncertainty` each task's share in it is
    learned. Rare positives get weight, or negatives are sampled to `negatives_per_positive`; probabilities are calibrated back.
    """

    kind: Literal["concatenation", "additive", "regression"] = "concatenation"
    num_factors: Annotated[int, Field(ge=1)] = 16
    factor_dropout: Fraction = 0.5
    num_experts: Annotated[int, Field(ge=1)] = 1
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    task_weight: Annotated[float, Field(ge=0)] = 0.1
    imbalance: Literal["none", "weight", "sample"] = "none"
    negatives_per_positive: Annotated[float, Field(gt=0)] = 1.0


class ModelConfig(Section):
    """The recommender's shape.

    `attention`: `softmax`; `hstu` weighs by SiLU without normalising and gates the output; `ligr` is softmax attention with a learned
    gate on each residual. `id_buckets` above 0 makes an id's vector of `id_hashes` rows of a table of that size, for catalogues too
    large for a row per item. In `query_rate` of the samples a target is also predicted with a query: what the user typed before it or,
    of the last target, some words of its text; with `text.mode` "off" there are none.
    """

    width: Annotated[int, Field(ge=4)] = 64
    num_layers: Annotated[int, Field(ge=1)] = 2
    num_heads: Annotated[int, Field(ge=1)] = 2
    dropout: Fraction = 0.2
    attention: Literal["softmax", "hstu", "ligr"] = "softmax"
    positions: Literal["learned", "rotary", "none"] = "learned"
    use_ids: bool = True
    id_dropout: Fraction = 0.0
    id_buckets: Annotated[int, Field(ge=0)] = 0
    id_hashes: Annotated[int, Field(ge=1)] = 2
    use_features: bool = True
    use_gaps: bool = True
    use_values: bool = True
    query_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    ranker: RankerConfig = RankerConfig()

    @property
    def keeps_texts(self) -> bool:
        """Tell whether training keeps the vectors of texts that a micro batch has not."""
        return self.text.refresh_steps > 0

    @property
    def scores_unseen_items(self) -> bool:
        """Tell whether training teaches what text and features are worth alone, which is all there is of an item that it never saw."""
        return self.id_dropout > 0 or not self.use_ids

    @property
    def has_queries(self) -> bool:
        """Tell whether the model learns to answer free-text queries."""
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
