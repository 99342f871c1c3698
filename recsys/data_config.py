"""The config's section `data`: input tables, cleaning, features, splits and shards; the other sections are `config.py`'s."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen part of the config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ColumnsConfig(Section):
    """The input's own names for the event columns; the catalogue's and the users' id columns carry the same names."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    position: str = "position"
    event: str = "event"
    value: str = "value"
    query: str = "query"


class ItemFeaturesConfig(Section):
    """Which catalogue columns are what. All empty: told by type (see `recsys.schema.infer_item_features`)."""

    text: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    separator: str = "|"
    statistics: bool = False


class CleaningConfig(Section):
    """Which events are dropped besides those that cannot be read; each rule counts what it drops.

    A user with more than `max_events_per_minute` events in any minute of the clock is a bot and dropped whole. Times are seconds and
    values are checked as they are; both ends of a range are allowed. Rules about time do not apply where the order is a position.
    """

    max_events_per_minute: Annotated[int, Field(ge=1)] | None = None
    min_time: int = 0
    max_time: int = 4_102_444_800  # 2100-01-01
    min_value: float | None = None
    max_value: float | None = None
    reject_negative_ids: bool = False


class SyntheticConfig(Section):
    """The seeded generator of `data.source = "synthetic"`."""

    num_users: Annotated[int, Field(ge=10)] = 2000
    num_items: Annotated[int, Field(ge=10)] = 800
    mean_events: Annotated[float, Field(ge=3)] = 40.0
    num_tastes: Annotated[int, Field(ge=2)] = 12
    seed: int = 0


class DataConfig(Section):
    """Input tables, how they are cleaned and split, and the dataset that training reads.

    `folder` holds all tables under their usual names; `events`, `items` and `users` name them one by one, as a file, a folder or a
    pattern. `base` is a dataset that these events are appended to. `num_shards` follows from the input's size where it is not given.
    `pseudonym_key_env` names the environment variable with the key that user ids are hashed with. A file that needs more than
    `max_file_memory_bytes` to be read is refused. The split `random` holds out `test_fraction` of all interactions and, of what is left,
    `validation_fraction`, each drawn by itself; a user's training interactions stay in order and come first. `withheld_items` is the
    share of the catalogue that is kept out of training, so that it is cold in validation and test.
    """

    source: Literal["files", "synthetic"] = "files"
    folder: str = ""
    events: str = ""
    items: str = ""
    users: str = ""
    dataset: str = ""
    base: str = ""
    columns: ColumnsConfig = ColumnsConfig()
    item_features: ItemFeaturesConfig = ItemFeaturesConfig()
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    cleaning: CleaningConfig = CleaningConfig()
    pseudonym_key_env: str = ""
    synthetic: SyntheticConfig = SyntheticConfig()
    event_kinds: tuple[str, ...] = ()
    like_threshold: float = 4.0
    k_core: Annotated[int, Field(ge=0)] = 0
    split: Literal["leave_one_out", "time", "random"] = "leave_one_out"
    validation_from: int | None = None
    test_from: int | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    withheld_items: Fraction = 0.0
    split_seed: int = 0
    max_history: Annotated[int, Field(ge=2, le=4096)] = 50
    window_stride: Annotated[int, Field(ge=1)] | None = None
    session_gap_seconds: Annotated[int, Field(ge=1)] = 1800
    num_shards: Annotated[int, Field(ge=1, le=65536)] | None = None
    row_group_rows: Annotated[int, Field(ge=1)] = 1024
    num_streams: Annotated[int, Field(ge=1, le=5040)] = 48
    max_file_memory_bytes: Annotated[int, Field(ge=64 << 20)] = 4 << 30

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.split == "time":
            if self.validation_from is None or self.test_from is None:
                raise ValueError("data.split = 'time' needs data.validation_from and data.test_from (seconds)")
            if self.validation_from >= self.test_from:
                raise ValueError("data.validation_from must be before data.test_from")
        if self.window_stride is not None and self.window_stride > self.max_history:
            raise ValueError(f"data.window_stride must be at most data.max_history ({self.max_history})")
        return self
