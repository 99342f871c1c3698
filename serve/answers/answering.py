"""Answers batches of requests from one exported version, without Ray or HTTP."""

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recsys.arrays import Integers, Mask, Scores
from recsys.config import Config
from recsys.config.service import ServiceConfig
from recsys.data.labels.seen import SeenRule
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.evaluation.diversity import content_vectors, diversified
from recsys.evaluation.ranking import NUM_CANDIDATES
from recsys.exports.files import load_export
from recsys.exports.profiles import ProfileStore
from recsys.exports.registry import Registry
from recsys.filters import ItemFilters, UnknownAttributeError
from recsys.predictor import Predictor, Ranking, Rule
from serve.answers.paging import Pages
from serve.answers.resolving import ResolvedUser, Resolver, now
from serve.api.problems import Answer, Problem, RefusedError
from serve.api.protocol import (
    POPULARITY,
    BatchRequest,
    BatchResponse,
    CandidateScore,
    ItemList,
    ListedItem,
    ListRequest,
    Message,
    ModelInfo,
    PostedInteraction,
    RankRequest,
    RecommendRequest,
    ScoreRequest,
    ScoreResponse,
    SimilarRequest,
    UserRequest,
)
from serve.live.users import LiveProfiles, LiveUsers

MASKS_BYTES = 64 << 20
"""Memory for the masks of recent filters."""

VARIANT = "default"
DIVERSITY_METHOD = "mmr"


class Asked(NamedTuple):
    """A request for a list, resolved: the user, the catalogue items that are left out, the rule for the others, and the page before."""

    request: ListRequest
    user: ResolvedUser
    exclude: Integers
    rule: Rule
    page: bytes = b""
    unknown_items: tuple[str, ...] = ()


class Answerer:
    """One loaded version. A whole batch goes through the predictor at once; each request gets its own answer."""

    def __init__(self, predictor: Predictor, profiles: ProfileStore, info: ModelInfo, live: LiveUsers | None = None) -> None:
        self.predictor = predictor
        self.filters = ItemFilters(predictor.catalogue, predictor.manifest)
        self.info = info.model_copy(update={"filter_columns": list(self.filters.columns)})
        self._users = Resolver(predictor, LiveProfiles(profiles, live or LiveUsers(), predictor), info)
        self._pages = Pages(predictor.catalogue.item_ids)
        self._seen = SeenRule(predictor.manifest)
        self._content = content_vectors(predictor.catalogue)
        self._item_index = predictor.item_index  # built here, so that the first request does not wait for it
        self._masks: OrderedDict[str, Mask] = OrderedDict()
        self.tasks = [task.name for task in predictor.manifest.tasks]
        reserved = set(CandidateScore.model_fields).intersection(self.tasks)
        if reserved:
            raise UserError(f"export {info.version}: has a task named '{min(reserved)}', which is a field of every answer; rename it")

    @classmethod
    def load_checked(cls, config: Config, version: str, live: LiveUsers | None = None, recent: Sequence[Message] = ()) -> "Answerer":
        """Load a version in this thread and let it answer recent requests, or made-up ones if there are none.

        Raises:
            UserError, RuntimeError: see `load` and `check`.
        """
        service = config.service
        limit_threads(service)
        loaded = cls.load(Registry.of_service(config), version, service.alias, Path(config.run.scratch) / "served", live)
        loaded.check(recent or loaded.made_up_requests(service.max_batch_size), service.max_batch_seconds)
        return loaded

    @classmethod
    def load(cls, registry: Registry, version: str, alias: str, scratch: Path, live: LiveUsers | None = None) -> "Answerer":
        """Fetch a version, verify it and load it; `live` has what happened since it was exported.

        Raises:
            UserError: the version is missing or damaged, or its answers differ from those at publication.
        """
        export = registry.manifest(version)
        loaded = load_export(registry.fetch(version, scratch), scratch)
        manifest = loaded.predictor.manifest
        info = ModelInfo(
            version=export.version,
            alias=alias,
            dataset_fingerprint=manifest.fingerprint,
            num_items=manifest.num_items,
            tasks=[task.name for task in manifest.tasks],
            event_kinds=list(manifest.event_kinds),
            default_event=manifest.event_kinds[manifest.default_kind],
            takes_queries=loaded.predictor.query_encoder is not None,
            profile_columns=list(manifest.profiles.columns) if loaded.predictor.reads_profiles else [],
            context_fields=list(manifest.contexts.given) if loaded.predictor.reads_contexts else [],
            metrics=export.metadata.get("metrics", {}),
            code_version=export.metadata.get("code_version"),
        )
        return cls(loaded.predictor, loaded.profiles, info, live)

    def check(self, requests: Sequence[Message], max_seconds: float) -> None:
        """Check that the numbers are finite, and that requests are answered, all of them together within `max_seconds`.

        Raises:
            RuntimeError: they are not.
        """
        (scores,) = self.predictor.score([Sequences.of([1])], [np.ones(1, np.int64)])
        if not all(np.isfinite(values).all() for values in (self.predictor.item_vectors.numpy(), *scores.values())):
            raise RuntimeError(f"version {self.info.version} gives numbers that are not finite")
        if not requests:
            return
        self.answer(requests)  # the first time, memory is allocated and files are read
        begin = time.monotonic()
        self.answer(requests)
        seconds = time.monotonic() - begin
        if seconds > max_seconds:
            raise RuntimeError(
                f"version {self.info.version} takes {seconds:.2f} s for a batch of {len(requests)} requests; "
                f"at most {max_seconds:g} s (service.max_batch_seconds)"
            )

    def made_up_requests(self, number: int) -> list[Message]:
        """Return requests to warm up with when there are no real ones: each with another item as history."""
        ids = self.predictor.catalogue.item_ids[1 : 1 + number]
        return [RecommendRequest(history=[PostedInteraction(item_id=item_id)], limit=10) for item_id in ids]

    def cost(self, request: Message) -> int:
        """Return a request's share of a batch: the places of its history and its candidates."""
        if isinstance(request, BatchRequest):
            return sum(map(self.cost, request.requests))
        if not isinstance(request, UserRequest):
            return 1
        config = self.predictor.config
        places = config.data.max_history if request.history is None else len(request.history)
        return 1 + places + (len(request.candidates) if isinstance(request, ScoreRequest) else config.ranking.num_candidates)

    def answer(self, requests: Sequence[Message]) -> list[Answer]:
        """Answer a batch of requests of any kind, in their order; requests of one kind are computed together."""
        answers: dict[int, Answer] = {}
        for kind, method in self._methods.items():
            chosen = [index for index, request in enumerate(requests) if type(request) is kind]
            if chosen:
                answers |= dict(zip(chosen, method([requests[index] for index in chosen]), strict=True))
        return [answers[index] for index in range(len(requests))]

    @property
    def _methods(self) -> dict[type[Message], Callable[[Any], list[Answer]]]:
        return {
            RecommendRequest: self.recommend,
            RankRequest: self.rank,
            ScoreRequest: self.score,
            SimilarRequest: self.similar,
            BatchRequest: lambda requests: [self.recommend_batch(request) for request in requests],
        }

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Answer each request with its best items."""
        return [_encoded(found) for found in self._lists(requests)]

    def recommend_batch(self, request: BatchRequest) -> Answer:
        """Answer a batch of lists; with `distinct`, lists are made one after another, each without the items of those before."""
        if not request.distinct:
            return _encoded(BatchResponse(results=[_result(found) for found in self._lists(request.requests)]))
        taken: list[str] = []
        results: list[ItemList | Problem] = []
        for single in request.requests:
            (found,) = self._lists([single.model_copy(update={"exclude_ids": [*single.exclude_ids, *taken]})])
            results.append(_result(found))
            if isinstance(found, ItemList):
                taken += [item.item_id for item in found.items]
        return _encoded(BatchResponse(results=results))

    def rank(self, requests: Sequence[RankRequest]) -> list[Answer]:
        """Answer each request with its candidates from best to worst."""
        lists = [
            RecommendRequest.model_construct(
                **{name: getattr(request, name) for name in UserRequest.model_fields},
                limit=len(request.candidates),
                include_ids=request.candidates,
                exclude_seen=False,
                include=["scores"],
            )
            for request in requests
        ]
        return [
            _encoded(found if isinstance(found, RefusedError) else found.model_copy(update={"next_page_token": None}))
            for found in self._lists(lists)
        ]

    def similar(self, requests: Sequence[SimilarRequest]) -> list[Answer]:
        """Answer each request with the items most similar to its item."""
        return [_encoded(_refused_or(self._similar, request)) for request in requests]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """Answer each request with its candidates' scores."""
        found = [_refused_or(self._users.resolve, request) for request in requests]
        candidates = [self._indices(request.candidates)[0] for request in requests]
        known = {index: user.history for index, user in enumerate(found) if isinstance(user, ResolvedUser) and user.history is not None}
        asked = [(history, candidates[index], requests[index].query) for index, history in known.items()]
        scores = dict(zip(known, self.predictor.score(*zip(*asked, strict=True)) if asked else (), strict=True))
        return [
            _encoded(user if isinstance(user, RefusedError) else self._scored(request, user, indices, scores.get(index)))
            for index, (request, user, indices) in enumerate(zip(requests, found, candidates, strict=True))
        ]

    def _lists(self, requests: Sequence[RecommendRequest]) -> list[ItemList | RefusedError]:
        """Return each request's list; all known users are ranked at once with the greatest depth, of which a shorter list is a prefix."""
        found = [_refused_or(self._ask, request) for request in requests]
        known = {index: asked for index, asked in enumerate(found) if isinstance(asked, Asked) and asked.user.history is not None}
        rankings: dict[int, Ranking] = {}
        if known:
            histories, exclude, rules = zip(*((asked.user.history, asked.exclude, asked.rule) for asked in known.values()), strict=True)
            depth = max(_depth(asked.request) for asked in known.values())
            queries = [requests[index].query for index in known]
            rankings = dict(zip(known, self.predictor.recommend(histories, depth, exclude, queries, rules), strict=True))
        return [
            asked if isinstance(asked, RefusedError) else _refused_or(self._listed, asked, rankings.get(index))
            for index, asked in enumerate(found)
        ]

    def _ask(self, request: RecommendRequest) -> Asked:
        user = self._users.resolve(request)
        exclude = [self._indices(request.exclude_ids)[0]]
        if request.exclude_seen and user.history is not None:
            exclude.append(self._seen(user.history, now(request) if user.history.timestamps.any() else None))
        shown, page = self._pages.shown(request.page_token)
        rule, unknown = self._rule(request)
        return Asked(request, user, np.concatenate([*exclude, shown]), rule, page, (*user.unknown_items, *unknown))

    def _similar(self, request: SimilarRequest) -> ItemList:
        item = self._item_index.get(request.item_id)
        if item is None:
            raise RefusedError(404, "the item is not in the catalogue of this version")
        rule, unknown = self._rule(request)
        exclude = self._indices(request.exclude_ids)[0]
        ranking = self.predictor.similar(item, _depth(request), exclude, rule)
        return self._list(Asked(request, ResolvedUser(None), exclude, rule, unknown_items=unknown), ranking, "similar", None)

    def _rule(self, request: ListRequest) -> tuple[Rule, tuple[str, ...]]:
        """Return the rule of a request's filter, boosts and included items, and the included items that are unknown.

        Raises:
            RefusedError: this version has no such attribute as a filter names.
        """
        allowed = None if request.filter is None else self._mask(request.filter)
        included, unknown = self._indices(request.include_ids or ())
        if request.include_ids is not None:
            chosen = np.zeros(len(self.predictor.catalogue.item_ids), np.bool_)
            chosen[included] = True
            allowed = chosen if allowed is None else allowed & chosen
        boost: Scores | None = None
        for part in request.boost:
            added = np.float32(part.by) * self._mask(part.filter).astype(np.float32)
            boost = added if boost is None else boost + added
        return Rule(allowed, boost), unknown

    def _mask(self, expression: Mapping[str, Any]) -> Mask:
        """Return which items satisfy a filter; masks of recent filters are kept."""
        key = json.dumps(expression, sort_keys=True)
        mask = self._masks.pop(key, None)
        if mask is None:
            try:
                mask = self.filters.mask(expression)
            except UnknownAttributeError as error:  # the form of a filter was checked with its request
                raise RefusedError(409, str(error)) from None
        self._masks[key] = mask
        while len(self._masks) > max(1, MASKS_BYTES // len(mask)):
            self._masks.popitem(last=False)
        return mask

    def _indices(self, item_ids: Sequence[str]) -> tuple[Integers, tuple[str, ...]]:
        """Return the indices of the items that are in the catalogue, and the ids of those that are not."""
        found = [self._item_index.get(item_id) for item_id in item_ids]
        unknown = dict.fromkeys(item_id for item_id, index in zip(item_ids, found, strict=True) if index is None)
        return np.asarray([index for index in found if index is not None], dtype=np.int64), tuple(unknown)

    def _listed(self, asked: Asked, ranking: Ranking | None) -> ItemList:
        """Build the list from a ranking or, without one, from the most popular items."""
        if ranking is not None:
            return self._list(asked, ranking, "model", None)
        popular = self.predictor.popular(_depth(asked.request), asked.exclude, asked.rule)
        return self._list(asked, popular, POPULARITY, POPULARITY)

    def _list(self, asked: Asked, ranking: Ranking, source: str, fallback: str | None) -> ItemList:
        request, catalogue = asked.request, self.predictor.catalogue
        best = self._diverse(request, ranking).head(request.limit)
        has_ranker = source == "model" and "retrieval" in best.parts
        items = [
            ListedItem(
                item_id=catalogue.item_ids[index],
                title=catalogue.titles[index],
                rank=rank,
                source=source,
                score=score,
                retrieval=float(best.parts["retrieval"][rank - 1]) if has_ranker else score if source == "model" else None,
                ranking=score if has_ranker else None,
                scores={name: float(values[rank - 1]) for name, values in best.parts.items()} if "scores" in request.include else None,
                fields=self.filters.fields(index) if "fields" in request.include else None,
            )
            for rank, (index, score) in enumerate(zip(best.items.tolist(), best.scores.tolist(), strict=True), start=1)
        ]
        is_full = len(items) == request.limit and isinstance(request, RecommendRequest)
        return ItemList(
            **self._said(),
            fallback=fallback,
            unknown_items=list(dict.fromkeys(asked.unknown_items)),
            items=items,
            next_page_token=self._pages.token(asked.page, best.items) if is_full else None,
        )

    def _diverse(self, request: ListRequest, ranking: Ranking) -> Ranking:
        """Re-rank the best candidates for diversity, as evaluation does."""
        if not request.diversity or not len(ranking.items):
            return ranking
        if self._content is None:
            raise RefusedError(409, "diversity: the items of this version have no attributes, vectors or text to tell them apart by")
        head = ranking.head(NUM_CANDIDATES)
        scores = head.scores[None].astype(np.float64)
        (lists,) = diversified(head.items[None], scores, self._content, DIVERSITY_METHOD, [request.diversity], request.limit)
        places = {item: place for place, item in enumerate(head.items.tolist())}
        order = np.array([places[item] for item in lists[0].tolist()], np.int64)
        return Ranking(head.items[order], head.scores[order], {name: values[order] for name, values in head.parts.items()})

    def _scored(self, request: ScoreRequest, user: ResolvedUser, indices: Integers, columns: dict[str, Scores] | None) -> ScoreResponse:
        """Build the answer for all candidates from the columns of the known ones; without columns, from interaction counts."""
        fallback = POPULARITY if columns is None else None
        columns = columns or {"retrieval": self.predictor.popularity.numpy()[indices]}
        rows = iter(zip(*(column.tolist() for column in columns.values()), strict=True))
        nothing = dict.fromkeys(("retrieval", *self.tasks))
        scores, unknown = [], list(user.unknown_items)
        for item_id in request.candidates:
            is_known = item_id in self._item_index
            if not is_known:
                unknown.append(item_id)
            values = nothing | dict(zip(columns, next(rows), strict=True)) if is_known else nothing
            scores.append(CandidateScore(item_id=item_id, known=is_known, **values))
        return ScoreResponse(**self._said(), fallback=fallback, unknown_items=list(dict.fromkeys(unknown)), scores=scores)

    def _said(self) -> dict[str, str]:
        return {"recommendation_id": uuid.uuid4().hex, "version": self.info.version, "variant": VARIANT}


def limit_threads(service: ServiceConfig) -> None:
    """Limit the threads of PyTorch, which count per calling thread, to a replica's CPUs."""
    torch.set_num_threads(max(1, int(service.cpus_per_replica)))


def _depth(request: ListRequest) -> int:
    return max(request.limit, NUM_CANDIDATES) if request.diversity else request.limit


def _refused_or(method: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a method returns, or the refusal that it raises."""
    try:
        return method(*arguments)
    except RefusedError as error:
        return error


def _encoded(found: Message | RefusedError) -> Answer:
    return found.answer if isinstance(found, RefusedError) else Answer.of(found)


def _result(found: ItemList | RefusedError) -> ItemList | Problem:
    return Problem.model_validate_json(found.answer.body) if isinstance(found, RefusedError) else found
