"""Answers batches of requests from one exported version, without Ray or HTTP."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.arrays import Integers
from recsys.data.labels.seen import SeenRule
from recsys.data.sequences import ASKED, Sequences
from recsys.errors import UserError
from recsys.exports.files import load_export
from recsys.exports.profiles import ProfileStore
from recsys.exports.registry import Registry
from recsys.predictor import Predictor, Ranking
from serve.api.problems import Answer, RefusedError
from serve.api.protocol import (
    POPULARITY,
    CandidateScore,
    ModelInfo,
    PostedInteraction,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    UserRequest,
)

NOTHING: Integers = np.zeros(0, np.int64)
NO_VALUE = float("nan")

Columns = dict[str, NDArray[np.float32]]
"""Scores of a request's known candidates; the keys are `retrieval` and the tasks."""


@dataclass(frozen=True)
class ResolvedUser:
    """The user of a request: the history, or None if nothing is known (popularity answers then), and the unknown posted items."""

    history: Sequences | None
    unknown_items: tuple[str, ...] = ()


class Answerer:
    """One loaded version. A whole batch goes through the predictor at once; each request gets its own answer."""

    def __init__(self, predictor: Predictor, profiles: ProfileStore, info: ModelInfo) -> None:
        self.predictor, self._profiles = predictor, profiles
        self.info = info
        self._seen = SeenRule(predictor.manifest)
        self._item_index = predictor.item_index  # built here, so that the first request does not wait for it
        self.tasks = [task.name for task in predictor.manifest.tasks]
        reserved = set(CandidateScore.model_fields).intersection(self.tasks)
        if reserved:
            raise UserError(f"export {info.version}: has a task named '{min(reserved)}', which is a field of every answer; rename it")

    @classmethod
    def load(cls, registry: Registry, version: str, alias: str, scratch: Path) -> "Answerer":
        """Fetch a version, verify it and load it.

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
            takes_queries=loaded.predictor.query_encoder is not None,
            profile_columns=list(manifest.profiles.columns) if loaded.predictor.reads_profiles else [],
            context_fields=list(manifest.contexts.given) if loaded.predictor.reads_contexts else [],
            metrics=export.metadata.get("metrics", {}),
            code_version=export.metadata.get("code_version"),
        )
        return cls(loaded.predictor, loaded.profiles, info)

    def check(self) -> None:
        """Check that the model gives finite numbers for a made-up user.

        Raises:
            RuntimeError: the numbers are not finite.
        """
        if not torch.isfinite(self.predictor.encode([Sequences.of([1])])).all():
            raise RuntimeError(f"version {self.info.version} gives numbers that are not finite")

    def answer(self, requests: Sequence[UserRequest]) -> list[Answer]:
        """Answer a batch of requests of both kinds, in their order."""
        lists = {index: request for index, request in enumerate(requests) if isinstance(request, RecommendRequest)}
        scores = {index: request for index, request in enumerate(requests) if isinstance(request, ScoreRequest)}
        answers = dict(zip(lists, self.recommend(list(lists.values())), strict=True))
        answers |= dict(zip(scores, self.score(list(scores.values())), strict=True))
        return [answers[index] for index in range(len(requests))]

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Answer each request with its k best items."""
        found = [self._find(request) for request in requests]
        histories = _known_histories(found)
        rankings = dict(zip(histories, self._rank([requests[index] for index in histories], list(histories.values())), strict=True))
        return [
            user if isinstance(user, Answer) else self._recommended(request, user, rankings.get(index))
            for index, (request, user) in enumerate(zip(requests, found, strict=True))
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """Answer each request with its candidates' scores."""
        found = [self._find(request) for request in requests]
        candidates = [self._indices(request.candidates) for request in requests]
        histories = _known_histories(found)
        asked = [(history, candidates[index], requests[index].query) for index, history in histories.items()]
        scores = dict(zip(histories, self.predictor.score(*zip(*asked, strict=True)) if asked else (), strict=True))
        return [
            user if isinstance(user, Answer) else self._scored(request, user, indices, scores.get(index))
            for index, (request, user, indices) in enumerate(zip(requests, found, candidates, strict=True))
        ]

    def _rank(self, requests: Sequence[RecommendRequest], histories: Sequence[Sequences]) -> list[Ranking]:
        """Rank for all requests at once with the largest k: a shorter ranking is a prefix of a longer one."""
        if not requests:
            return []
        deepest = max(request.k for request in requests)
        exclude = [
            self._seen(history, _now(request) if history.timestamps.any() else None) if request.exclude_seen else NOTHING
            for request, history in zip(requests, histories, strict=True)
        ]
        return self.predictor.recommend(histories, deepest, exclude, [request.query for request in requests])

    def _find(self, request: UserRequest) -> ResolvedUser | Answer:
        """Return the user, or the answer that refuses the request; an unknown user with a query gets an empty history."""
        if request.query is not None and not self.info.takes_queries:
            return Answer.problem(422, "query: this version was trained without queries (model.query_rate = 0); ask without one")
        try:
            self._check_fields("profile", request.profile, self.info.profile_columns)
            self._check_fields("context", request.context, self.info.context_fields)
            found = self._find_history(request)
        except RefusedError as error:
            return error.answer
        return replace(found, history=self._situated(request, found.history))

    def _check_fields(self, name: str, given: Mapping[str, str] | None, known: Sequence[str]) -> None:
        if unknown := sorted(set(given or ()).difference(known)):
            raise RefusedError(422, f"{name}.{unknown[0]}: this version does not read it; it reads: {', '.join(known) or 'nothing'}")

    def _situated(self, request: UserRequest, history: Sequences | None) -> Sequences | None:
        """Return the history with the request's profile and context; None if nothing says what to recommend."""
        predictor, manifest = self.predictor, self.predictor.manifest
        profiles = None if history is None else history.profiles
        if predictor.reads_profiles and request.profile is not None:
            profiles = manifest.profiles.merge(profiles or manifest.profiles.encode([{}]), request.profile)
        has_profile = predictor.reads_profiles and profiles is not None
        if (history is None or not len(history.items)) and request.query is None and not has_profile:
            return None
        history = replace(Sequences.of([]) if history is None else history, profiles=profiles)
        if not predictor.reads_contexts:
            return history
        last = int(history.timestamps[-1]) if history.timestamps.any() else None
        asked = manifest.contexts.ask(_now(request) if manifest.has_time else None, last, len(history.items), request.context or {})
        return replace(history, scalars={ASKED: asked})

    def _find_history(self, request: UserRequest) -> ResolvedUser:
        if request.user_id is None:
            return ResolvedUser(None) if request.history is None else self._read_history(request.history)
        return ResolvedUser(self._profiles.find(request.user_id))

    def _read_history(self, posted: Sequence[PostedInteraction]) -> ResolvedUser:
        """Convert a posted history; items that are not in the catalogue are left out and listed."""
        rows, manifest = [], self.predictor.manifest
        for position, interaction in enumerate(posted):
            kind = manifest.default_kind if interaction.event is None else self.predictor.event_index.get(interaction.event)
            if kind is None:
                known = ", ".join(manifest.event_kinds)
                raise RefusedError(422, f"history.{position}.event: is not an event kind of this model; known: {known}")
            if not manifest.kind_table[kind].in_history:
                continue
            rows.append(
                (
                    self._item_index.get(interaction.item_id, 0),
                    kind,
                    interaction.timestamp or 0,
                    NO_VALUE if interaction.value is None else interaction.value,
                )
            )
        unknown = dict.fromkeys(interaction.item_id for interaction in posted if interaction.item_id not in self._item_index)
        known_rows = sorted((row for row in rows if row[0]), key=lambda row: row[2])
        return ResolvedUser(Sequences.of(*zip(*known_rows, strict=True)) if known_rows else None, tuple(unknown))

    def _indices(self, item_ids: Sequence[str]) -> Integers:
        """Return the indices of the candidates that are in the catalogue."""
        indices = (self._item_index.get(item_id) for item_id in item_ids)
        return np.asarray([index for index in indices if index is not None], dtype=np.int64)

    def _recommended(self, request: RecommendRequest, user: ResolvedUser, ranking: Ranking | None) -> Answer:
        """Build the answer from a ranking or, without one, from the most popular items."""
        fallback = POPULARITY if ranking is None else None
        ranking = ranking or self.predictor.popular(request.k, NOTHING)
        catalogue = self.predictor.catalogue
        best = ranking.head(request.k)
        rows = zip(best.items.tolist(), best.scores.tolist(), strict=True)
        items = [
            RecommendedItem(
                item_id=catalogue.item_ids[index],
                title=catalogue.titles[index],
                score=score,
                rank=rank,
                scores={name: float(values[rank - 1]) for name, values in best.parts.items()} or None,
            )
            for rank, (index, score) in enumerate(rows, start=1)
        ]
        return Answer.of(
            RecommendResponse(version=self.info.version, fallback=fallback, unknown_items=list(user.unknown_items), items=items)
        )

    def _scored(self, request: ScoreRequest, user: ResolvedUser, indices: Integers, columns: Columns | None) -> Answer:
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
        unknown_items = list(dict.fromkeys(unknown))
        return Answer.of(ScoreResponse(version=self.info.version, fallback=fallback, unknown_items=unknown_items, scores=scores))


def _now(request: UserRequest) -> int:
    return int(time.time()) if request.time is None else request.time


def _known_histories(found: Sequence[ResolvedUser | Answer]) -> dict[int, Sequences]:
    """Return the known histories by the position of their request."""
    return {index: user.history for index, user in enumerate(found) if isinstance(user, ResolvedUser) and user.history is not None}
