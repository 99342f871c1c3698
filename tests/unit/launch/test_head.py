"""Tests of the local head that need no Ray."""

import socket

import pytest

from recsys.launch import head


def test_free_ports_are_distinct_and_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(port for port in range(21_000, 32_000, 5) if all(_is_free(each) for each in range(port, port + 5)))
    monkeypatch.setattr(head, "FREE_PORTS", range(first, first + 5))
    assert sorted(head.free_ports(5)) == list(range(first, first + 5))
    with socket.socket() as used:
        used.bind(("127.0.0.1", first + 2))
        assert sorted(head.free_ports(4)) == [first, first + 1, first + 3, first + 4]
        with pytest.raises(RuntimeError, match="fewer than 5 free ports"):
            head.free_ports(5)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
