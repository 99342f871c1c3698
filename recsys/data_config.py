"""The config's section `data`: input tables, cleaning, features, splits and shards; the other sections are `config.py`'s."""

import codecs
import math
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from recsys.schema import LARGEST_SECONDS, read_time

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _read_seconds(value: Any) -> Any:
    """Read a time that may be ISO text or TOML's own as seconds since 1970."""
    if isinstance(value, date):  # a datetime is one
        value = value.isoformat()
    if isinstance(value, str) and not value.lstrip("+-").isdigit():
        seconds = read_time(value)
        if math.isnan(seconds):
            raise ValueError("must be seconds since 1970 or an ISO time (UTC where it names no zone); 1704067200 or 2024-01-01 would work")
        return math.floor(seconds)
    if isinstance(value, int) and abs(value) >= LARGEST_SECONDS:
        raise ValueError(f"must be seconds since 1970, and has too many digits for them; {value // 1000} would be milliseconds as seconds")
    return value


Seconds = Annotated[int, BeforeValidator(_read_seconds)]
"""A time in settings."""

AUTO = "auto"
CSV_SEPARATORS = (",", ";", "\t", "|")
"""Those that are told from a file; others can be given."""


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


class CsvConfig(Section):
    r"""How CSV files write fields; `auto` tells it from the beginning of each file.

    `separator` is one character, `\t` a tab. `quote` is what fields are put in, empty: nothing; `escape` stands before a quote within
    quotes, empty: it is doubled. `encoding` is one of Python's names, such as `cp1252`.
    """

    separator: str = AUTO
    quote: str = AUTO
    escape: str = AUTO
    encoding: str = AUTO

    @field_validator("separator", mode="before")
    @classmethod
    def _name_tab(cls, value: Any) -> Any:
        return "\t" if value in ("\\t", "tab") else value

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        for name, examples in (("separator", CSV_SEPARATORS), ("quote", ('"', "'", "")), ("escape", ("\\", ""))):
            value = getattr(self, name)
            if value != AUTO and (value not in examples if not value else len(value) > 1 or not value.isascii() or value in "\r\n"):
                raise ValueError(f"data.csv.{name} = {value!r}: must be one ASCII character or 'auto'; {examples[0]!r} would work")
        if self.encoding != AUTO:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"data.csv.encoding = {self.encoding!r}: is unknown to Python; 'utf-8' or 'cp1252' would work") from None
        return self


class ItemFeaturesConfig(Section):
    """Which catalogue columns are what. All empty: told by type (see `recsys.data.inputs.item_columns`), but for those `ignored`."""

    text: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    separator: str = "|"
    statistics: bool = False

    @property
    def names_columns(self) -> bool:
        """Return whether any feature column is configured."""
        return bool(self.text or self.categories or self.numbers or self.vectors)


class CleaningConfig(Section):
    """Which events are dropped besides those that cannot be read; each rule counts what it drops.

    A user with more than `max_events_per_minute` events in any minute of the clock is a bot and dropped whole. Times are seconds or ISO
    text, and values are checked as they are; both ends of a range are allowed. Rules about time do not apply where the order is a position.
    """

    max_events_per_minute: Annotated[int, Field(ge=1)] | None = None
    min_time: Seconds = 0
    max_time: Seconds = 4_102_444_800  # 2100-01-01
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
    csv: CsvConfig = CsvConfig()
    item_features: ItemFeaturesConfig = ItemFeaturesConfig()
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    cleaning: CleaningConfig = CleaningConfig()
    pseudonym_key_env: str = ""
    synthetic: SyntheticConfig = SyntheticConfig()
    event_kinds: tuple[str, ...] = ()
    like_threshold: float = 4.0
    k_core: Annotated[int, Field(ge=0)] = 0
    split: Literal["leave_one_out", "time", "random"] = "leave_one_out"
    validation_from: Seconds | None = None
    test_from: Seconds | None = None
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
                raise ValueError("data.split = 'time' needs data.validation_from and data.test_from, such as 1704067200 or 2024-01-01")
            if self.validation_from >= self.test_from:
                raise ValueError("data.validation_from must be before data.test_from")
        if self.window_stride is not None and self.window_stride > self.max_history:
            raise ValueError(f"data.window_stride must be at most data.max_history ({self.max_history})")
        return self
