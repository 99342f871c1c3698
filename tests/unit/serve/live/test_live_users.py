"""A replica's copy of the live log, and the histories that join it with the export."""

import numpy as np
import pytest

from recsys.exports.files import Export
from serve.live.changes import Erased, Happened, Merged, hash_of, session_key, user_key
from serve.live.users import MAX_EVENTS, LiveProfiles, LiveUsers
from tests.exports import publish_export, service_config


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return publish_export(service_config(tmp_path_factory.mktemp("users")), "v1")


def happened(key: str, item_id: str, timestamp: int, event: str = "view", value: float | None = None) -> Happened:
    name = f"{key}-{item_id}-{timestamp}"
    return Happened(change_id=name, key=key, item_id=item_id, event=event, timestamp=timestamp, value=value)


def found(profiles: LiveProfiles, user_id: str) -> list[tuple[int, int, int]]:
    history = profiles.find(user_id)
    assert history is not None
    return list(zip(history.items.tolist(), history.events.tolist(), history.timestamps.tolist(), strict=True))


def test_events_follow_the_exported_history(export: Export) -> None:
    users = LiveUsers()
    profiles = LiveProfiles(export.profiles, users, export.predictor)
    before = found(profiles, "user-3")
    end = before[-1][2]
    users.apply(happened(user_key("user-3"), "item-9", end + 20, event="purchase", value=4.5))
    users.apply(happened(user_key("user-3"), "item-8", end + 10))
    assert found(profiles, "user-3") == [*before, (8, 0, end + 10), (9, 1, end + 20)]
    history = profiles.find("user-3")
    assert history is not None
    assert history.values[-1] == 4.5
    assert np.isnan(history.values[-2])
    exported = export.profiles.find("user-3")
    assert exported is not None
    assert len(exported.items) == len(before)


def test_what_the_version_does_not_know_or_already_has_is_left_out(export: Export) -> None:
    users = LiveUsers()
    profiles = LiveProfiles(export.profiles, users, export.predictor)
    before = found(profiles, "user-3")
    item, kind, timestamp = before[-1]
    known = export.predictor.manifest.event_kinds[kind]
    for change in (
        happened(user_key("user-3"), f"item-{item}", timestamp, event=known),
        happened(user_key("user-3"), "gone", timestamp + 1),
        happened(user_key("user-3"), "item-2", timestamp + 1, event="stare"),
    ):
        users.apply(change)
    assert found(profiles, "user-3") == before


def test_a_new_user_and_a_session_have_what_they_did(export: Export) -> None:
    users = LiveUsers()
    profiles = LiveProfiles(export.profiles, users, export.predictor)
    assert profiles.find("new") is None
    assert profiles.find_session(session_key("new")) is None
    users.apply(happened(user_key("new"), "item-1", 5))
    users.apply(happened(session_key("new"), "item-2", 4))
    assert found(profiles, "new") == [(1, 0, 5)]
    session = profiles.find_session(session_key("new"))
    assert session is not None
    assert session.items.tolist() == [2]
    users.apply(Merged(change_id="m", session=session_key("new"), key=user_key("new")))
    assert found(profiles, "new") == [(2, 0, 4), (1, 0, 5)]
    assert profiles.find_session(session_key("new")) is None


def test_an_erased_user_is_unknown_until_something_new_happens(export: Export) -> None:
    users = LiveUsers()
    profiles = LiveProfiles(export.profiles, users, export.predictor)
    users.apply(happened(user_key("user-3"), "item-9", 10**10))
    users.apply(Erased(change_id="e", key_hash=hash_of(user_key("user-3"))))
    assert profiles.find("user-3") is None
    assert profiles.find("user-4") is not None
    users.apply(happened(user_key("user-3"), "item-9", 10**10))
    assert found(profiles, "user-3") == [(9, 0, 10**10)]


def test_the_newest_events_are_held() -> None:
    users = LiveUsers()
    for number in range(MAX_EVENTS + 5):
        users.apply(happened("k", f"item-{number}", number))
    assert [event.timestamp for event in users.events("k")] == list(range(5, MAX_EVENTS + 5))
