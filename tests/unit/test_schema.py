"""Tests of the vocabulary."""

from recsys.schema import order_event_kinds


def test_configured_event_kinds_come_first_in_their_order() -> None:
    found = {"purchase", "view", "share", "download"}
    assert order_event_kinds(found) == ("view", "purchase", "download", "share")
    assert order_event_kinds(found, ("view", "share")) == ("view", "share", "purchase", "download")
    assert order_event_kinds(found, ("purchase", "view")) == ("purchase", "view", "download", "share")
