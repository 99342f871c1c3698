"""Records of finished tasks, and progress: lines without a terminal, a live bar on one. The integration tests run the tasks themselves."""

import logging
import os
import pty
import sys
import termios
from types import SimpleNamespace

import pytest

from recsys.ingest import ray_tasks
from recsys.ingest.ray_tasks import Outcome, Progress, Record
from recsys.store import Storage


class Counted(Outcome):
    rejected: dict[str, int]


def test_a_record_gives_back_what_was_added(any_storage: Storage) -> None:
    record = Record(any_storage, any_storage.uri("staging", "outcomes"), Counted)
    assert record.read() == {}
    for number in (11, 2, 2):
        record.add(number, Counted(rows=number, rejected={"null_user": 1}))
    assert record.read() == {2: Counted(rows=2, rejected={"null_user": 1}), 11: Counted(rows=11, rejected={"null_user": 1})}


def test_without_a_terminal_progress_is_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 6.0, 8.0])
    monkeypatch.setattr(ray_tasks, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    with caplog.at_level(logging.INFO), Progress("events", 5, 2) as progress:
        for _ in range(3):
            progress.add(40)
    assert caplog.messages == [
        "events: 2 of 5 tasks were already finished",
        "events: 4 of 5 tasks, 80 rows, 13 rows/s",
        "events: 5 of 5 tasks, 120 rows, 15 rows/s",
    ]


@pytest.mark.timeout(60)
def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with caplog.at_level(logging.INFO), Progress("shards", 2, 0) as progress:
            progress.add(1000)
            progress.add(500)
        shown = ""
        while "1,500 rows" not in shown:  # the kernel may deliver it in parts
            shown += os.read(reader, 10_000).decode()
    os.close(reader)
    assert "shards: 100%" in shown
    assert "2/2" in shown
    assert not caplog.messages
