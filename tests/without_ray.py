"""The passes of prepare_data in the process of a test, without Ray."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from recsys.ingest import job
from recsys.ingest.ray_tasks import Record, Reported
from recsys.ingest.synthetic import events as synthetic


def run_here(label: str, function: Callable[[Any], Reported], tasks: Sequence[Any], record: Record[Reported]) -> list[Reported]:
    """Stand in for Ray: each task twice, as after a lost worker, and its outcome through JSON."""
    return [record.kind.model_validate_json([function(task), function(task)][1].model_dump_json()) for task in tasks]


def run_once(label: str, function: Callable[[Any], Reported], tasks: Sequence[Any], record: Record[Reported]) -> list[Reported]:
    """Stand in for Ray, each task once."""
    return [record.kind.model_validate_json(function(task).model_dump_json()) for task in tasks]


def patch_run_tasks(monkeypatch: pytest.MonkeyPatch, run_tasks: Any = run_here) -> None:
    """Let the passes run here."""
    monkeypatch.setattr(job, "run_tasks", run_tasks)
    monkeypatch.setattr(synthetic, "run_tasks", run_tasks)
