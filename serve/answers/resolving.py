"""Finds out who asks: turns a request's user, history, profile and context into what the predictor reads."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from recsys.data.sequences import ASKED, Sequences
from recsys.predictor import Predictor
from serve.api.problems import RefusedError
from serve.api.protocol import ModelInfo, PostedInteraction, UserRequest
from serve.live.changes import session_key
from serve.live.users import LiveProfiles

NO_VALUE = float("nan")


@dataclass(frozen=True)
class ResolvedUser:
    """The user of a request: the history, or None if nothing is known (popularity answers then), and the unknown posted items."""

    history: Sequences | None
    unknown_items: tuple[str, ...] = ()


class Resolver:
    """Resolves the users of requests to one version."""

    def __init__(self, predictor: Predictor, profiles: LiveProfiles, info: ModelInfo) -> None:
        self._predictor, self._manifest, self._profiles, self._info = predictor, predictor.manifest, profiles, info
        self._item_index = predictor.item_index

    def resolve(self, request: UserRequest) -> ResolvedUser:
        """Return the user of a request; an unknown user with a query has an empty history.

        Raises:
            RefusedError: the request has something that the version does not read.
        """
        if request.query is not None and not self._info.takes_queries:
            raise RefusedError(409, "query: this version was trained without queries (model.query_rate = 0); ask without one")
        _check_fields("profile", request.profile, self._info.profile_columns)
        _check_fields("context", request.context, self._info.context_fields)
        if request.history is not None:
            found = self._read_history(request.history)
        elif request.session_id is not None:
            found = ResolvedUser(self._profiles.find_session(session_key(request.session_id)))
        else:
            found = ResolvedUser(None if request.user_id is None else self._profiles.find(request.user_id))
        return replace(found, history=self._situated(request, found.history))

    def _situated(self, request: UserRequest, history: Sequences | None) -> Sequences | None:
        """Return the history with the request's profile and context; None if nothing says what to recommend."""
        predictor, manifest = self._predictor, self._manifest
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
        asked = manifest.contexts.ask(now(request) if manifest.has_time else None, last, len(history.items), request.context or {})
        return replace(history, scalars={ASKED: asked})

    def _read_history(self, posted: Sequence[PostedInteraction]) -> ResolvedUser:
        """Convert a posted history; items that are not in the catalogue are left out and listed."""
        rows, manifest = [], self._manifest
        for position, interaction in enumerate(posted):
            kind = manifest.default_kind if interaction.event is None else self._predictor.event_index.get(interaction.event)
            if kind is None:
                known = ", ".join(manifest.event_kinds)
                raise RefusedError(409, f"history.{position}.event: is not an event kind of this model; known: {known}")
            if not manifest.kind_table[kind].in_history:
                continue
            index, value = self._item_index.get(interaction.item_id, 0), interaction.value
            rows.append((index, kind, interaction.timestamp or 0, NO_VALUE if value is None else value))
        unknown = dict.fromkeys(interaction.item_id for interaction in posted if interaction.item_id not in self._item_index)
        known_rows = sorted((row for row in rows if row[0]), key=lambda row: row[2])
        return ResolvedUser(Sequences.of(*zip(*known_rows, strict=True)) if known_rows else None, tuple(unknown))


def now(request: UserRequest) -> int:
    """Return when the list of a request is shown, in seconds."""
    return int(time.time()) if request.time is None else request.time


def _check_fields(name: str, given: Mapping[str, str] | None, known: Sequence[str]) -> None:
    if unknown := sorted(set(given or ()).difference(known)):
        raise RefusedError(409, f"{name}.{unknown[0]}: this version does not read it; it reads: {', '.join(known) or 'nothing'}")
