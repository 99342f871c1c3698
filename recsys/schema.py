"""Column names, event kinds, tasks, feature kinds, and the Arrow schemas of a dataset."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import pyarrow as pa

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"
POSITION = "position"
EVENT = "event"
VALUE = "value"
QUERY = "query"
IMPRESSION_ID = "impression_id"
DISPLAY_POSITION = "display_position"
SPLIT = "split"
LABEL_PREFIX, SLICE_PREFIX, CONTEXT_PREFIX = "label:", "slice:", "context:"
"""Event columns that only some logs have: the exposure that an event belongs to, its place on the page, the part of the data that it
belongs to, its labels by task, values to report metrics by, and the situation of the user."""

PADDING_ITEM = 0
"""Catalogue index of "no item"; real items are numbered from 1."""

MAX_ID_CHARACTERS = 512
"""Maximum length of a user id, an item id or an event kind."""

LARGEST_SECONDS = 10**11
"""Numbers from here on (12 digits, the year 5138) are not times in seconds."""

_WHOLE = re.compile(r"(-?\d+)\.0+")
_ZONE = re.compile(r"\s*(?:UTC|GMT)$|(?<=\d)\s+(?=[+-]\d\d:?\d\d$)")
_DATE = re.compile(r"^(\d{4})[-/](\d\d?)[-/](\d\d?)(?!\d)")

DEFAULT_EVENT = "interaction"
KNOWN_EVENT_ORDER = ("impression", "view", "click", "favorite", "cart", "purchase")
"""Weak to strong."""

Role = Literal["exposure", "positive", "negative", "ignored"]
"""What an event says: the item was shown; the user wanted it; the user did not want it; nothing."""

KNOWN_ROLES: dict[str, Role] = {
    **dict.fromkeys(("impression", "exposure", "show", "shown", "display", "displayed", "serve", "served"), "exposure"),
    **dict.fromkeys(("dislike", "skip", "hide", "block", "unlike", "downvote", "thumbs_down", "not_interested"), "negative"),
}
"""Roles of kinds by their lower-case names; every other kind is positive."""

TIE_RULE = "interactions of a user are sorted by time; equal times keep the input's order"
RANK_TIE_RULE = "items with equal scores are ranked by catalogue index, the lower first"

EVENTS_SCHEMA = pa.schema(
    [
        (USER_ID, pa.string()),
        (ITEM_ID, pa.string()),
        (TIMESTAMP, pa.int64()),
        (EVENT, pa.string()),
        (VALUE, pa.float32()),
        (QUERY, pa.string()),
        ("input_order", pa.int64()),
    ]
)
"""One row per event, as every importer returns it. `timestamp` is seconds, or the position within the user's history if there are no
times; `value` and `query` are null if the event has none; `input_order` is the row number over all input files."""

OPTIONAL_TYPES = {
    IMPRESSION_ID: pa.string(),
    DISPLAY_POSITION: pa.int32(),
    SPLIT: pa.int8(),
    LABEL_PREFIX: pa.int8(),
    SLICE_PREFIX: pa.string(),
    CONTEXT_PREFIX: pa.string(),
}
"""Types of the optional event columns, some by their prefix. A split is 0 training, 1 validation, 2 test."""


def events_schema(optional: Sequence[str]) -> pa.Schema:
    """Return EVENTS_SCHEMA with some optional columns."""
    types = [(name, OPTIONAL_TYPES[f"{name.partition(':')[0]}:" if ":" in name else name]) for name in optional]
    return pa.schema([*EVENTS_SCHEMA, *types])


_SEQUENCE_FIELDS = [
    ("items", pa.list_(pa.int32())),
    ("events", pa.list_(pa.int8())),
    ("timestamps", pa.list_(pa.int64())),
    ("values", pa.list_(pa.float32())),
    ("queries", pa.list_(pa.int32())),
]
"""Interactions of one user, oldest first; `queries` are indices into QUERIES_SCHEMA, 0 for no query."""

CONTEXTS = "contexts"
_CONTEXT_FIELD = (CONTEXTS, pa.list_(pa.int64()))
"""The contexts of the interactions (see `recsys.data.features.contexts`), in datasets that have contexts."""

SEQUENCE_COLUMNS = (*(name for name, _ in _SEQUENCE_FIELDS), CONTEXTS)

_PROFILE_FIELDS = [("profile_categories", pa.list_(pa.int32())), ("profile_numbers", pa.list_(pa.float32()))]
"""The profile of a row's user (see `recsys.data.features.profiles`), in datasets that have profiles."""

PROFILE_COLUMNS = tuple(name for name, _ in _PROFILE_FIELDS)

TRAIN_SCHEMA = pa.schema([("user_index", pa.int64()), *_SEQUENCE_FIELDS, ("first_target", pa.int32())])
"""One row per training sample: up to `max_history + 1` interactions of one user, oldest first. Interactions from
`first_target` on are targets, those before it are context only."""

USERS_SCHEMA = pa.schema(
    [
        ("user_index", pa.int64()),
        (USER_ID, pa.string()),
        *_SEQUENCE_FIELDS,
        ("num_train", pa.int32()),
        ("num_validation", pa.int32()),
        ("attributes", pa.map_(pa.string(), pa.string())),
    ]
)
"""One row per user. The first `num_train` interactions are training data, the next `num_validation` the validation targets, the rest
the test targets, each oldest first. With a random split the row as a whole is not in order."""

CATALOGUE_SCHEMA = pa.schema(
    [
        ("item_index", pa.int32()),
        (ITEM_ID, pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("categories", pa.list_(pa.int32())),
        ("numbers", pa.list_(pa.float32())),
        ("vector", pa.list_(pa.float32())),
        ("train_count", pa.int64()),
    ]
)
"""One row per item, sorted by `item_index` from 1. `categories` are indices from 1 into the manifest's vocabulary,
`numbers` are standardized (NaN: missing), `train_count` counts the item's interactions in the training data."""

_EXPOSURE_FIELDS = [
    ("exposed_items", pa.list_(pa.int32())),
    ("exposed_places", pa.list_(pa.int32())),
    ("exposed_labels", pa.list_(pa.int32())),
    ("exposed_known", pa.list_(pa.int32())),
    ("exposed_displays", pa.list_(pa.int32())),
    ("exposed_contexts", pa.list_(pa.int64())),
]
"""Items shown to one user, or explicit negative events. A place is the number of the row's interactions before it. Labels and which of
them are known are bits, one per name in the manifest's `exposure_tasks`; a display position is 0 if it is unknown, and so is a context."""

EXPOSURE_COLUMNS = tuple(name for name, _ in _EXPOSURE_FIELDS)

_HELD_OUT_FIELDS = [
    ("exposed_times", pa.list_(pa.int64())),
    ("exposed_slices", pa.list_(pa.list_(pa.string()))),
    ("num_validation_exposures", pa.int32()),
]


class RowParts(NamedTuple):
    """What the rows of a dataset's users and samples have beyond the interactions."""

    exposures: bool = False
    contexts: bool = False
    profiles: bool = False


def _with_parts(schema: pa.Schema, parts: RowParts, held_out: list[tuple[str, pa.DataType]]) -> pa.Schema:
    fields = [_CONTEXT_FIELD] * parts.contexts + _PROFILE_FIELDS * parts.profiles + [*_EXPOSURE_FIELDS, *held_out] * parts.exposures
    return pa.schema([*schema, *fields])


def train_schema(parts: RowParts) -> pa.Schema:
    """Return the schema of training samples; with exposures, `first_target` may be 0."""
    return _with_parts(TRAIN_SCHEMA, parts, [])


def users_schema(parts: RowParts) -> pa.Schema:
    """Return the schema of users; their exposures are those in the validation and the test data, the former first."""
    return _with_parts(USERS_SCHEMA, parts, _HELD_OUT_FIELDS)


LISTED_SCHEMA = pa.schema([USERS_SCHEMA.field(USER_ID), USERS_SCHEMA.field("attributes"), *_PROFILE_FIELDS])
"""One row per user of the users table without events, in datasets that have profiles."""

QUERIES_SCHEMA = pa.schema([("query_index", pa.int32()), (QUERY, pa.string())])
"""One row per query text that users of one partition typed, numbered from 1 over all partitions and versions; partitions share no rows."""

COUNTS_SCHEMA = pa.schema([("item_index", pa.int32()), ("count", pa.int64())])
"""One row per item whose training interactions change in an appended version; `count` is added to the earlier count."""

USER_STATISTICS_SCHEMA = pa.schema(
    [
        ("user_index", pa.int64()),
        ("num_interactions", pa.int64()),
        ("num_values", pa.int64()),
        ("value_mean", pa.float64()),
        ("value_variance", pa.float64()),
        ("mean_gap_seconds", pa.float64()),
        ("recency_seconds", pa.int64()),
        ("num_sessions", pa.int64()),
        ("mean_session_length", pa.float64()),
        ("event_counts", pa.list_(pa.int64())),
    ]
)
"""One row per user, from the training interactions only; null if there is no data. Variances are population variances.
`recency_seconds` is the time from the user's last training interaction to the end of the training data. Columns that need times are
null if the order is by position. `event_counts` are in the order of the manifest's `event_kinds`."""

ITEM_STATISTICS_SCHEMA = pa.schema(
    [
        ("item_index", pa.int32()),
        ("train_count", pa.int64()),
        ("num_values", pa.int64()),
        ("value_mean", pa.float64()),
        ("value_variance", pa.float64()),
        ("first_seen", pa.int64()),
        ("last_seen", pa.int64()),
        ("recency_seconds", pa.int64()),
        ("period_counts", pa.list_(pa.int64())),
        ("num_shown", pa.int64()),
        ("num_taken", pa.int64()),
    ]
)
"""One row per catalogue item, otherwise as USER_STATISTICS_SCHEMA. `period_counts` are the item's training interactions in equal periods
between the first and the last training interaction of the dataset; empty without times. `num_shown` counts the exposures with a label of
the weakest positive kind, `num_taken` those where it is positive; null in data without exposures."""

RESERVED_NAMES = ("rating", "like", "retrieval", "item_id", "known")
"""Names of scores and of fields next to them; the task of an event kind with one of these names gets the suffix `_event`."""

FeatureKind = Literal["text", "categories", "numbers", "vectors"]


@dataclass(frozen=True)
class Kind:
    """An event kind and how its events are used.

    Positive events are targets, with `weight` in the retrieval loss. With `in_history` the model reads the events. With `marks_seen` the
    item is not recommended again, for `seen_seconds` after the event if that is set.
    """

    name: str
    role: Role = "positive"
    weight: float = 1.0
    in_history: bool = True
    marks_seen: bool = True
    seen_seconds: int | None = None

    @property
    def is_target(self) -> bool:
        """Whether the events are what retrieval predicts."""
        return self.role == "positive"

    @property
    def says_untaken(self) -> bool:
        """Whether an event in a history says that the item was not, or not yet, taken."""
        return self.in_history and self.role in ("exposure", "negative")


def taken_follows_shown(kinds: Sequence[Kind], has_labels: bool) -> bool:
    """Return whether histories have both the exposure and the event that says it was taken; with labels they have one of them."""
    return not has_labels and any(kind.says_untaken and kind.role == "exposure" for kind in kinds)


@dataclass(frozen=True)
class Task:
    """A prediction for a (user, item) pair besides the next item.

    With `event`, the label is 1 if the event is at least as strong as this kind. Otherwise the label is the event's value (regression) or
    `value >= threshold` (binary).
    """

    name: str
    kind: Literal["binary", "regression"]
    event: str | None = None
    threshold: float | None = None


def known_role(kind: str) -> Role:
    """Return the role that a kind has by its name."""
    return KNOWN_ROLES.get(kind.lower(), "positive")


def strength(kind: str, configured: tuple[str, ...] = ()) -> tuple[int, str]:
    """Return a key that sorts kinds from weak to strong: the configured ones, then those of the known order, then all others by name."""
    order = list(dict.fromkeys((*configured, *KNOWN_EVENT_ORDER)))
    return order.index(kind) if kind in order else len(order), kind


def order_event_kinds(kinds: set[str], configured: tuple[str, ...] = (), roles: Mapping[str, Role] = {}) -> tuple[str, ...]:
    """Order event kinds from weak to strong; exposures come first and negative kinds next, unless they are among the configured ones."""
    first = {"exposure": 0, "negative": 1}
    return tuple(
        sorted(
            kinds,
            key=lambda kind: (2 if kind in configured else first.get(roles.get(kind, "positive"), 2), *strength(kind, configured)),
        )
    )


def task_name(kind: str) -> str:
    """Return the name of the task that predicts an event kind."""
    return f"{kind}_event" if kind in RESERVED_NAMES else kind


def event_tasks(kinds: Sequence[Kind]) -> tuple[str, ...]:
    """Return the names of the tasks that predict the positive kinds."""
    return tuple(task_name(kind.name) for kind in kinds if kind.is_target)


def derive_tasks(kinds: tuple[Kind, ...], num_values: int, like_threshold: float, has_exposures: bool = False) -> tuple[Task, ...]:
    """Return the ranking tasks: one per positive kind, and `rating` and `like` if there are values.

    Without exposures the weakest kind has no task, since nothing says that it did not happen.
    """
    positive = [kind.name for kind in (kinds if has_exposures else kinds[1:]) if kind.is_target]
    tasks = [Task(name=task_name(kind), kind="binary", event=kind) for kind in positive]
    if num_values:
        tasks += [Task("rating", "regression"), Task("like", "binary", threshold=like_threshold)]
    return tuple(tasks)


def normalize_id(text: str) -> str:
    """Return the canonical form of an id in tables, settings and requests: Unicode NFC, without surrounding whitespace."""
    return unicodedata.normalize("NFC", text).strip()


def normalize_value(text: str) -> str:
    """Return the canonical form of a value of a profile or a context: as of an id, and `25` for `25.0`, `true` for `True`."""
    value = normalize_id(text)
    if value in ("True", "False"):
        return value.lower()
    whole = _WHOLE.fullmatch(value)
    return whole[1] if whole else value


def read_time(text: str) -> float:
    """Parse ISO 8601 text to seconds since 1970, NaN if invalid; ` UTC`, a space before the offset and slashes in dates are allowed."""
    iso = _DATE.sub(lambda match: f"{match[1]}-{match[2]:0>2}-{match[3]:0>2}", text.strip()).replace("z", "Z")
    while (shorter := _ZONE.sub("", iso)) != iso:
        iso = shorter
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
