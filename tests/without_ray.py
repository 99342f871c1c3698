"""The passes of prepare_data in the process of a test, without Ray."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from recsys.ingest import passes
from recsys.ingest.ray_tasks import Record
from recsys.ingest.synthetic import events as synthetic


def run_here(label: str, function: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], record: Record) -> list[dict[str, Any]]:
    """Stand in for Ray: each task twice, as after a lost worker, and its outcome through JSON."""
    return [json.loads(json.dumps([function(task), function(task)][1])) for task in tasks]


def run_once(label: str, function: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], record: Record) -> list[dict[str, Any]]:
    """Stand in for Ray, each task once."""
    return [json.loads(json.dumps(function(task))) for task in tasks]


def patch_run_tasks(monkeypatch: pytest.MonkeyPatch, run_tasks: Any = run_here) -> None:
    """Let the passes run here."""
    monkeypatch.setattr(passes, "run_tasks", run_tasks)
    monkeypatch.setattr(synthetic, "run_tasks", run_tasks)
