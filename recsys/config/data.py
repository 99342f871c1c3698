"""The config section `data`: input tables, cleaning, features, splits and shards."""

import codecs
import math
from datetime import date
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from recsys.config.base import Count, Fact, Fraction, Positive, PositiveInt, Section
from recsys.schema import LARGEST_SECONDS, Kind, Role, known_role, read_time

AUTO = "auto"


def _read_seconds(value: Any) -> Any:
    """Return seconds since 1970 for ISO text, a TOML date or time, or a number."""
    if isinstance(value, date):  # a datetime is also a date
        value = value.isoformat()
    if isinstance(value, str) and not value.lstrip("+-").isdigit():
        seconds = read_time(value)
        if math.isnan(seconds):
            raise ValueError("must be seconds since 1970 or an ISO time (UTC where it names no zone); 1704067200 or 2024-01-01 would work")
        return math.floor(seconds)
    if isinstance(value, int) and abs(value) >= LARGEST_SECONDS:
        raise ValueError(f"must be seconds since 1970, and has too many digits for seconds; for milliseconds, {value // 1000} would work")
    return value


Seconds = Annotated[int, BeforeValidator(_read_seconds)]
DerivedField = Literal["hour", "weekday", "gap", "activity"]
InputPath = Annotated[str, Fact.PATH, Fact.INPUT, Fact.MAY_CHANGE]


class ColumnsConfig(Section):
    """Names of the event columns in the input. The id columns of catalogue and users have the same names."""

    user_id: str = "user_id"
    """Column of user ids."""
    item_id: str = "item_id"
    """Column of item ids."""
    timestamp: str = "timestamp"
    """Column of times."""
    position: str = "position"
    """Column of positions within a user's history, used if there is no timestamp column."""
    event: str = "event"
    """Column of event kinds, such as view or purchase; optional."""
    value: str = "value"
    """Column of ratings or other values; optional."""
    query: str = "query"
    """Column of the query that the user typed before the event; optional; empty: ignored."""
    impression_id: str = "impression_id"
    """Column that joins an exposure with what the user did; optional; empty: ignored."""
    display_position: str = "display_position"
    """Column of an exposure's place on the page, from 1; optional; empty: ignored."""
    slate: str = ""
    """Column with a list of the items shown at once, for logs with a row per page; each becomes an exposure, those taken a click."""
    slate_flags: str = ""
    """Column with a list of 0 and 1: which items of the slate were taken; empty: the items end with -0 or -1."""
    split: str = ""
    """Column of the part that an event belongs to, for `data.split = "column"`: train, validation or test."""
    slices: tuple[str, ...] = ()
    """Columns of events whose values metrics of tasks are reported by."""
    context: tuple[str, ...] = ()
    """Columns of events with the situation of the user, such as device or page; each value is a category."""
    labels: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults
    """Columns of labels, 0 or 1, by task; each event is then an exposure, and one with label 1 an event of this kind."""


class CsvConfig(Section):
    """Dialect of the CSV files; `auto` detects a setting from the beginning of each file."""

    separator: str = AUTO
    r"""Character between fields; `\t` is a tab."""
    quote: str = AUTO
    """Quote character; empty: fields are not quoted."""
    escape: str = AUTO
    """Escape character before a quote within a quoted field; empty: quotes are doubled."""
    encoding: str = AUTO
    """Encoding by its Python name, such as `cp1252`."""

    @field_validator("separator", mode="before")
    @classmethod
    def _name_tab(cls, value: Any) -> Any:
        return "\t" if value in ("\\t", "tab") else value

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        for name, example in (("separator", ","), ("quote", '"'), ("escape", "\\")):
            value = getattr(self, name)
            is_character = len(value) == 1 and value.isascii() and value not in "\r\n"
            if not (is_character or value == AUTO or (value == "" and name != "separator")):
                raise ValueError(f"data.csv.{name} = {value!r}: must be one ASCII character or 'auto'; {example!r} would work")
        if self.encoding != AUTO:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"data.csv.encoding = {self.encoding!r}: is unknown to Python; 'utf-8' or 'cp1252' would work") from None
        return self


class ItemFeaturesConfig(Section):
    """Feature columns of the catalogue, by kind. If no column is given, each column's kind is inferred from its type."""

    text: tuple[str, ...] = ()
    """Columns that the language model reads, in this order; the first is the title."""
    categories: tuple[str, ...] = ()
    """Columns with one category or a list of categories."""
    numbers: tuple[str, ...] = ()
    """Numeric columns; they are standardized."""
    vectors: tuple[str, ...] = ()
    """Columns of pretrained vectors."""
    ignored: tuple[str, ...] = ()
    """Columns that are not used."""
    separator: str = "|"
    """Separator between the categories in a text; empty: texts are not split."""
    statistics: bool = False
    """Add statistics of the training data, such as popularity, mean value and the rate at which an item is taken, as item features."""

    @property
    def names_columns(self) -> bool:
        """Return whether any feature column is configured."""
        return bool(self.text or self.categories or self.numbers or self.vectors)


class UserFeaturesConfig(Section):
    """Columns of users that are inputs of the model, by kind. If no column is given, each column's kind is inferred from its values."""

    categories: tuple[str, ...] = ()
    """Columns with a category, or several with the separator between them."""
    text: tuple[str, ...] = ()
    """Columns of text, of which the words are read."""
    numbers: tuple[str, ...] = ()
    """Numeric columns; they are standardized. A column may also be given as a category."""
    vectors: tuple[str, ...] = ()
    """Columns of lists of numbers."""
    ignored: tuple[str, ...] = ()
    """Columns that are no input."""
    separator: str = "|"
    """Separator between the categories in a text; empty: texts are not split."""

    @property
    def names_columns(self) -> bool:
        """Return whether any column is configured."""
        return bool(self.categories or self.text or self.numbers or self.vectors)


class CleaningConfig(Section):
    """Rules that drop readable events. Each rule counts the events that it drops; rules about time need timestamps."""

    max_events_per_minute: PositiveInt | None = None
    """A user with more events in any clock minute counts as a bot; all events of the user are dropped."""
    min_time: Seconds = 0
    """Earliest time that is kept."""
    max_time: Seconds = 4_102_444_800  # 2100-01-01
    """Latest time that is kept."""
    min_value: float | None = None
    """Smallest value that is kept."""
    max_value: float | None = None
    """Largest value that is kept."""
    reject_negative_ids: bool = False
    """Drop events whose user or item id is a negative number."""


class KindConfig(Section):
    """How the events of one kind are used. What is unset follows from the role."""

    role: Role | None = None
    """`positive`: a target; `negative`: the user did not want the item; `exposure`: it was shown; `ignored`. Unset: by the kind's name."""
    weight: Positive = 1.0
    """Weight of these targets in the retrieval loss."""
    in_history: bool | None = None
    """The model reads these events; unset: positive and negative ones."""
    marks_seen: bool | None = None
    """The item is not recommended again; unset: after positive and negative events."""
    seen_seconds: PositiveInt | None = None
    """The item may be recommended again after this time; unset: never."""

    def resolve(self, name: str) -> Kind:
        """Return the kind of this name, with what is unset filled in."""
        role = self.role or known_role(name)
        is_reaction = role in ("positive", "negative")
        in_history = is_reaction if self.in_history is None else self.in_history
        marks_seen = is_reaction if self.marks_seen is None else self.marks_seen
        return Kind(name, role, self.weight, in_history, marks_seen, self.seen_seconds)


class SyntheticConfig(Section):
    """The seeded generator of `data.source = "synthetic"`."""

    num_users: Annotated[int, Field(ge=10)] = 2000
    """Number of users."""
    num_items: Annotated[int, Field(ge=10)] = 800
    """Number of items."""
    mean_events: Annotated[float, Field(ge=3)] = 40.0
    """Mean number of events per user."""
    num_tastes: Annotated[int, Field(ge=2)] = 12
    """Number of latent tastes of users and items."""
    seed: int = 0
    """Seed of the generator."""


class DataConfig(Section):
    """Input tables, how they are cleaned and split, and the dataset that training reads."""

    source: Annotated[Literal["files", "synthetic"], Fact.INPUT, Fact.MAY_CHANGE] = "files"
    """Read `files`, or generate `synthetic` events."""
    folder: InputPath = ""
    """Folder with all tables under their usual names."""
    events: InputPath = ""
    """Event table: a file, a folder or a pattern."""
    items: InputPath = ""
    """Catalogue: a file, a folder or a pattern; optional."""
    users: InputPath = ""
    """User attributes: a file, a folder or a pattern; optional."""
    dataset: InputPath = ""
    """Dataset that training reads, as printed by `jobs.prepare_data`."""
    base: InputPath = ""
    """Dataset that the events are appended to."""
    columns: Annotated[ColumnsConfig, Fact.INPUT] = ColumnsConfig()
    csv: Annotated[CsvConfig, Fact.INPUT] = CsvConfig()
    item_features: ItemFeaturesConfig = ItemFeaturesConfig()
    user_features: UserFeaturesConfig = UserFeaturesConfig()
    derived_context: tuple[DerivedField, ...] = ()
    """Context that follows from times (in UTC) and histories: time since the interaction before, number of interactions before."""
    sensitive: tuple[str, ...] = ()
    """Columns of users, items and events that are never an input of the model; they stay attributes for slices and fairness."""
    time_unit: Annotated[Literal["auto", "s", "ms", "us", "ns"], Fact.INPUT] = "auto"
    """Unit of numeric times; `auto` infers it from the number of digits."""
    cleaning: CleaningConfig = CleaningConfig()
    pseudonym_key_env: str = ""
    """Environment variable with the key for hashing user ids; empty: ids are not hashed."""
    synthetic: Annotated[SyntheticConfig, Fact.INPUT] = SyntheticConfig()
    event_kinds: tuple[str, ...] = ()
    """Event kinds from weak to strong; others rank above them: impression, view, click, favorite, cart, purchase, then by name."""
    kinds: dict[str, KindConfig] = {}  # noqa: RUF012 - pydantic copies defaults
    """Roles of event kinds, by name."""
    collapse_seconds: PositiveInt | None = None
    """Events of a user on one item that are at most this far apart are collapsed to the strongest of them; unset: off."""
    exposure_seconds: PositiveInt = 86_400
    """An event belongs to the user's last exposure of the item, if that is at most this long ago and has no other impression id."""
    max_exposures: PositiveInt = 512
    """Maximum number of exposures in a training sample; a user with more gets further samples."""
    like_threshold: float = 4.0
    """Smallest value that counts as a like."""
    k_core: Count = 0
    """Repeatedly drop users and items with fewer interactions than this; 0: off."""
    split: Literal["leave_one_out", "time", "random", "column"] = "leave_one_out"
    """Hold out each user's last two targets (`leave_one_out`), everything from a `time` on, a `random` share, or by a `column`."""
    validation_from: Seconds | None = None
    """Start of the validation data, for `split = "time"`."""
    test_from: Seconds | None = None
    """Start of the test data, for `split = "time"`."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of all interactions in the test data, for `split = "random"`."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the remaining interactions in the validation data, for `split = "random"`."""
    withheld_items: Fraction = 0.0
    """Share of the catalogue that is withheld from training, so that these items are cold in validation and test."""
    withheld_users: Fraction = 0.0
    """Share of the users whose history is withheld from training and evaluation, so that lists for new users can be measured."""
    split_seed: int = 0
    """Seed of random splits and of the withheld items and users."""
    max_history: Annotated[int, Field(ge=2, le=4096)] = 50
    """Longest history that the model reads; if it is below the dataset's, training samples are cut into pieces."""
    window_stride: PositiveInt | None = None
    """Interactions between the starts of two training samples of a long history; unset: `max_history`."""
    session_gap_seconds: PositiveInt = 1800
    """A pause longer than this ends a session."""
    num_shards: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Number of training shards; unset: chosen by the size of the input."""
    row_group_rows: PositiveInt = 1024
    """Samples per Parquet row group."""
    num_streams: Annotated[int, Field(ge=1, le=5040)] = 48
    """Number of streams that samples are read from in turn."""
    max_file_memory_bytes: Annotated[int, Field(ge=64 << 20), Fact.INPUT] = 4 << 30
    """Input files that need more memory than this to be read are rejected."""

    def kind(self, name: str) -> Kind:
        """Return an event kind with its role."""
        return self.kinds.get(name, KindConfig()).resolve(name)

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        for name in self.kinds:
            kind = self.kind(name)
            if kind.role == "positive" and not kind.in_history:
                raise ValueError(f"data.kinds.{name}.in_history = false: targets come from histories; another role would work")
            if kind.marks_seen and not kind.in_history:
                raise ValueError(f"data.kinds.{name}.marks_seen = true: seen items come from histories; set in_history = true, too")
            if kind.role == "ignored" and kind.in_history:
                raise ValueError(f"data.kinds.{name}.in_history = true: events with the role ignored are dropped; another role would work")
        if self.collapse_seconds is not None and self.columns.labels:
            raise ValueError("data.collapse_seconds: rows of data.columns.labels are not collapsed; leave it out")
        return self

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        names = self.columns.context
        if taken := sorted({name for name in names if name in get_args(DerivedField) or names.count(name) > 1}):
            raise ValueError(f"data.columns.context = {taken[0]}: is named twice, or as a field of data.derived_context; rename the column")
        return self

    @model_validator(mode="after")
    def _check_sensitive(self) -> Self:
        own = {
            **{f"columns.{name}": (getattr(self.columns, name),) for name in ("event", "value", "query")},
            "columns.context": self.columns.context,
            **{f"user_features.{kind}": getattr(self.user_features, kind) for kind in ("categories", "text", "numbers", "vectors")},
            **{f"item_features.{kind}": getattr(self.item_features, kind) for kind in ("categories", "text", "numbers", "vectors")},
        }
        for key, names in own.items():
            if both := sorted(set(names).intersection(self.sensitive)):
                raise ValueError(f"data.{key} = {both[0]}: data.sensitive names it, so it can be no input; take it out of one of them")
        return self

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.split == "time":
            if self.validation_from is None or self.test_from is None:
                raise ValueError("data.split = 'time' needs data.validation_from and data.test_from, such as 1704067200 or 2024-01-01")
            if self.validation_from >= self.test_from:
                raise ValueError("data.validation_from must be before data.test_from")
        if (self.split == "column") != bool(self.columns.split):
            raise ValueError("data.split = 'column' needs data.columns.split, a column of train, validation and test, and reverse")
        if self.window_stride is not None and self.window_stride > self.max_history:
            raise ValueError(f"data.window_stride must be at most data.max_history ({self.max_history})")
        return self
