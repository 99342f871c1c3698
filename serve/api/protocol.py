"""Requests and responses of the service, and parsing of request bodies."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from recsys.errors import UserError
from recsys.filters import check_form
from recsys.schema import MAX_ID_CHARACTERS, normalize_id
from serve.answers.paging import TOKEN_PATTERN
from serve.api.problems import Problem

MAX_HISTORY = 4096
MAX_QUERY_CHARACTERS = 1000
MAX_SECONDS = 253_402_300_799
"""The last second of the year 9999; a larger number is probably in milliseconds."""

MAX_VALUE = 1e6
MAX_EVENTS = 1000
MAX_BOOSTS = 20
MAX_LISTS = 32
MAX_TOKEN_CHARACTERS = 30_000
MAX_FIELDS = 100
MAX_FIELD_CHARACTERS = 10_000
"""Limits of a profile and a context; a vector is a list, which is spelled as text."""

POPULARITY = "popularity"


class Message(BaseModel):
    """A frozen part of a request or a response: no unknown keys, no type conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _spell(value: Any) -> Any:
    """Normalize an id as data preparation does; the field's type refuses other values than text."""
    return normalize_id(value) if isinstance(value, str) else value


Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS, pattern=r"[^\s\x1c-\x1f\x85]"), BeforeValidator(_spell)]


COMPONENT = "x-component"
"""Names a component of the OpenAPI document whose schema is not a model's."""


def _whole(value: Any) -> Any:
    """Return 10 for 10.0, which is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _well_formed(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        check_form(value)
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


WHOLE = BeforeValidator(_whole)
Filter = Annotated[dict[str, JsonValue], AfterValidator(_well_formed), WithJsonSchema({COMPONENT: "Filter"})]


def _has(name: str) -> dict[str, Any]:
    """Return the JSON schema of an object in which a key has a value."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


_ONE_USER = [_has(name) for name in ("user_id", "session_id", "history")]
_NO_USER: dict[str, Any] = {"not": {"anyOf": _ONE_USER}, "anyOf": [_has("query"), _has("profile")]}
_ALL_TIMES: dict[str, Any] = {"anyOf": [{"items": _has("timestamp")}, {"items": {"not": _has("timestamp")}}]}
"""Rules across keys, as the OpenAPI document says them; the validators below check them."""


class PostedInteraction(Message):
    """One interaction of a user; without `event` it has the weakest kind. `timestamp` is in seconds; `value` is, for example, a rating."""

    item_id: Identifier
    event: Identifier | None = None
    timestamp: Annotated[int, Field(ge=0, le=MAX_SECONDS), WHOLE] | None = None
    value: Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE)] | None = None


def _spell_field(value: Any) -> Any:
    """Spell a number, a truth value or a list of such as data preparation does; the field's type refuses what is not text then."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    return "|".join(map(str, map(_spell_field, value))) if isinstance(value, list) else value


FieldName = Annotated[str, Field(max_length=MAX_ID_CHARACTERS)]
FieldText = Annotated[
    str,
    Field(max_length=MAX_FIELD_CHARACTERS),
    BeforeValidator(_spell_field),
    WithJsonSchema({"type": ["string", "number", "boolean"], "maxLength": MAX_FIELD_CHARACTERS, "description": "or a list of such"}),
]
Fields = Annotated[dict[FieldName, FieldText], Field(max_length=MAX_FIELDS)]


class UserRequest(Message):
    """The user of a request, by id, session, history or profile, and a query in words.

    A history is oldest first. If it has timestamps, it is sorted by them, and equal ones keep their order. A query needs no user. A
    profile has columns of the users table; for a known user they replace the stored ones. The context has columns of the events; `time`
    is when the list is shown, in seconds, now if it is not given.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [*_ONE_USER, _NO_USER]})

    user_id: Identifier | None = None
    session_id: Identifier | None = None
    history: Annotated[list[PostedInteraction], Field(max_length=MAX_HISTORY, json_schema_extra=_ALL_TIMES)] | None = None
    query: Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS, pattern=r"\S")] | None = None
    profile: Fields | None = None
    context: Fields | None = None
    time: Annotated[int, Field(ge=0, le=MAX_SECONDS), WHOLE] | None = None

    @model_validator(mode="after")
    def _check_user(self) -> Self:
        given = sum(value is not None for value in (self.user_id, self.session_id, self.history))
        if given > 1 or (not given and self.query is None and self.profile is None):
            raise ValueError("give exactly one of user_id, session_id and history; a query or a profile needs none")
        if self.history and len({interaction.timestamp is None for interaction in self.history}) > 1:
            raise ValueError("history: give every interaction a timestamp, or none")
        return self


class Boost(Message):
    """An amount that is added to the scores of the items that satisfy a filter."""

    filter: Filter
    by: Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE)]


class ListRequest(Message):
    """What every list is asked with: its length, which items may be in it, and what is told of them."""

    limit: Annotated[int, Field(ge=1, validation_alias=AliasChoices("limit", "k")), WHOLE] = 10
    filter: Filter | None = None
    boost: Annotated[list[Boost], Field(max_length=MAX_BOOSTS)] = Field(default_factory=list)
    include_ids: list[Identifier] | None = None
    exclude_ids: list[Identifier] = Field(default_factory=list)
    diversity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    include: Annotated[list[Literal["scores", "fields"]], Field(max_length=2)] = Field(default_factory=list)

    @field_validator("limit")
    @classmethod
    def _check_limit(cls, value: int, info: ValidationInfo) -> int:
        return _at_most(value, value, "max_k", info)

    @field_validator("include_ids", "exclude_ids", mode="before")
    @classmethod
    def _check_ids(cls, value: Any, info: ValidationInfo) -> Any:
        return _at_most(value, len(value), "max_candidates", info) if isinstance(value, list) else value


class RecommendRequest(UserRequest, ListRequest):
    """A request for the best items.

    `limit` (formerly `k`) is the length of the list; `page_token` is that of the answer before, with the same other fields. `filter` is
    a condition on attributes, as in {"genre": ["Drama", "War"], "year": {"gte": 1990}}; `boost` adds to the scores of some items;
    `include_ids` allows only these items. `diversity` weighs difference against relevance.
    """

    page_token: Annotated[str, Field(max_length=MAX_TOKEN_CHARACTERS, pattern=TOKEN_PATTERN)] | None = None
    exclude_seen: bool = True


class PostedEvent(Message):
    """Something that a user, or a session without a known user, did with an item.

    An event counts once, whatever number of times its `event_id` is sent. Without `event` it has the model's weakest kind, without a
    `timestamp` (seconds) it happens now. `recommendation_id` is that of the answer that showed the item, `position` its rank there.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [_has("user_id"), _has("session_id")]})

    event_id: Identifier
    user_id: Identifier | None = None
    session_id: Identifier | None = None
    item_id: Identifier
    event: Identifier | None = None
    timestamp: Annotated[int, Field(ge=0, le=MAX_SECONDS), WHOLE] | None = None
    value: Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE)] | None = None
    recommendation_id: Identifier | None = None
    position: Annotated[int, Field(ge=1, le=MAX_HISTORY), WHOLE] | None = None

    @model_validator(mode="after")
    def _check_user(self) -> Self:
        if (self.user_id is None) == (self.session_id is None):
            raise ValueError("give either user_id or session_id, and not both")
        return self


class EventsRequest(Message):
    """Events to record."""

    events: Annotated[list[PostedEvent], Field(min_length=1, max_length=MAX_EVENTS)]


class EventResult(Message):
    """What became of an event: `accepted`, or `duplicate` if its id was known."""

    event_id: str
    status: Literal["accepted", "duplicate"]


class EventsResponse(Message):
    """The results, in the order of the events; an accepted event survives the end of any process of the service."""

    results: list[EventResult]


class MergeRequest(Message):
    """The user that a session belongs to from now on."""

    user_id: Identifier


class Done(Message):
    """The answer to a change."""

    status: Literal["ok"] = "ok"


class SimilarRequest(ListRequest):
    """A request for the items most similar to one."""

    item_id: Identifier


class ScoreRequest(UserRequest):
    """A request for the scores of candidates, in their order; `service.max_candidates` limits their number."""

    candidates: Annotated[list[Identifier], Field(min_length=1)]

    @field_validator("candidates", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        return _at_most(value, len(value), "max_candidates", info) if isinstance(value, list) else value


class RankRequest(ScoreRequest):
    """A request for candidates from best to worst, by the score that orders recommendations."""


class BatchRequest(Message):
    """Several requests for lists, answered together; with `distinct` no item is in two lists."""

    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=MAX_LISTS)]
    distinct: bool = False


class ListedItem(Message):
    """An item of a list; rank 1 is the best.

    `score` orders the list; it is `ranking`, the blend of all scores, if the version ranks candidates, and else `retrieval`. `source` is
    what proposed the item. `scores` (with `include = ["scores"]`) are those that the blend weighs; `fields` (with "fields") the attributes.
    """

    item_id: str
    title: str
    rank: int
    source: str
    score: float
    retrieval: float | None = None
    ranking: float | None = None
    scores: dict[str, float] | None = None
    fields: dict[str, JsonValue] | None = None


class Answered(Message):
    """What every answer says of itself; `recommendation_id` joins it with the events that follow from it."""

    recommendation_id: str
    version: str
    variant: str


class ItemList(Answered):
    """The best items. With `fallback`, nothing is known of the user: items are the most popular ones, scores their interaction counts."""

    fallback: str | None = None
    unknown_items: list[str] = Field(default_factory=list)
    items: list[ListedItem]
    next_page_token: str | None = None


class BatchResponse(Message):
    """The lists of a batch, in the order of the requests."""

    results: list[ItemList | Problem]


class CandidateScore(Message):
    """A candidate's scores: `retrieval`, and one more key per task. All are null if the item is unknown."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    item_id: str
    known: bool
    retrieval: float | None


class ScoreResponse(Answered):
    """The candidates' scores. With `fallback`, the user is unknown: `retrieval` is the item's interaction count, task scores are null."""

    fallback: str | None
    unknown_items: list[str]
    scores: list[CandidateScore]


class ModelInfo(Message):
    """The served version and the model in it."""

    version: str
    alias: str
    dataset_fingerprint: str
    num_items: int
    tasks: list[str]
    event_kinds: list[str]
    default_event: str = ""
    takes_queries: bool
    profile_columns: list[str] = Field(default_factory=list)
    context_fields: list[str] = Field(default_factory=list)
    filter_columns: list[str] = Field(default_factory=list)
    metrics: dict[str, JsonValue]
    code_version: str | None


def _at_most(value: Any, size: int, limit_name: str, info: ValidationInfo) -> Any:
    limit = (info.context or {}).get(limit_name)
    if limit is not None and size > limit:
        raise ValueError(f"{size} is more than this service allows; at most {limit} (service.{limit_name})")
    return value
