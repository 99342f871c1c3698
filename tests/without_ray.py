"""Run the passes of prepare_data in the test's process, without Ray."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from recsys.ingest import job
from recsys.ingest.ray_tasks import Record, Reported
from recsys.ingest.synthetic import events as synthetic


def run_here(label: str, function: Callable[[Any], Reported], tasks: Sequence[Any], record: Record[Reported]) -> list[Reported]:
    """Replace Ray: run each task twice, as after a lost worker, and pass its result through JSON."""
    return [record.kind.model_validate_json([function(task), function(task)][1].model_dump_json()) for task in tasks]


def run_once(label: str, function: Callable[[Any], Reported], tasks: Sequence[Any], record: Record[Reported]) -> list[Reported]:
    """Replace Ray: run each task once, and pass its result through JSON."""
    return [record.kind.model_validate_json(function(task).model_dump_json()) for task in tasks]


def patch_run_tasks(monkeypatch: pytest.MonkeyPatch, run_tasks: Any = run_here) -> None:
    """Replace Ray's `run_tasks` in the modules of the passes."""
    monkeypatch.setattr(job, "run_tasks", run_tasks)
    monkeypatch.setattr(synthetic, "run_tasks", run_tasks)
