"""The whole pipeline: on a local folder up to a running service, and as a submitted job on S3 with the same metrics."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recsys.launch.head import Head, start_head, stop_head
from recsys.store import Storage
from tests.conftest import S3Server

ROOT = Path(__file__).parents[2]
CONFIG = "tests/integration/pipeline.toml"
FROM_EVENTS_TO_EXPORT = 'run.stages=["prepare_data","train","evaluate","export"]'
WITHOUT_SERVICE = 'run.stages=["prepare_data","train","train_id_only","search","evaluate","export"]'

pytestmark = pytest.mark.ray


def clean_environment(home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    hidden = ("RAY_", "RECSYS_")
    return {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | {
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_verb(module: str, *settings: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", module, "--config", CONFIG, *(f"--set={setting}" for setting in settings)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1]) | {"stderr": finished.stderr}


def working_tree() -> set[str]:
    listing = subprocess.run(["git", "status", "--porcelain", "--ignored"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in listing.stdout.splitlines() if "cache" not in line and "__pycache__" not in line}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pipeline with its service on a local folder, run twice; the second run must find every stage done."""
    folder = tmp_path_factory.mktemp("local")
    environment = clean_environment(folder / "home")
    settings = (f"storage.root={folder / 'store'}", f"run.scratch={folder / 'scratch'}", "service.port=0")
    before = working_tree()
    try:
        first = run_verb("jobs.pipeline", *settings, environment=environment)
        second = run_verb("jobs.pipeline", *settings, environment=environment)
    finally:
        stopped = run_verb("serve.stop", *settings, environment=environment)
    return {"first": first, "second": second, "stopped": stopped, "folder": folder, "strays": working_tree() - before}


def test_every_stage_gives_its_part(local: dict[str, Any]) -> None:
    result = local["first"]
    assert result["prepare_data"]["num_users"] == 300
    assert result["train"]["steps"] > 0
    assert result["search"]["num_trials"] == 2
    assert len(result["search"]["leaderboard"]) == 2
    assert {"popularity"} == result["evaluate"]["baselines"].keys()
    assert result["export"]["alias"] == "production"
    assert result["serve"]["version"] == result["export"]["version"]
    assert len(result["recommendations"]) == 3
    for answer in result["recommendations"]:
        assert len(answer["recommendations"]) == 5
        assert not set(answer["recommendations"]) & set(answer["history"])


def test_the_summary_is_for_people(local: dict[str, Any]) -> None:
    text = local["first"]["stderr"]
    for part in ("300 users, 120 items", "popularity", "id only", "may like", "wall time", "stop it", "ask it: curl "):
        assert part in text


def test_a_second_run_skips_what_is_done(local: dict[str, Any]) -> None:
    first, second = local["first"], local["second"]
    assert second["prepare_data"]["skipped"]
    for stage in ("train", "train_id_only"):
        assert second[stage]["checkpoint"] == first[stage]["checkpoint"]
        assert second[stage]["seconds"] < first[stage]["seconds"] / 2
    assert second["search"]["winner"] == first["search"]["winner"]
    assert second["export"]["version"] == first["export"]["version"]
    assert second["evaluate"]["metrics"] == first["evaluate"]["metrics"]


def test_nothing_is_left_running_or_outside_store_and_scratch(local: dict[str, Any]) -> None:
    assert local["stopped"]["stopped"]
    assert not local["strays"]
    home = local["folder"] / "home"
    assert [path.name for path in home.rglob("*") if path.is_file()] == []


@pytest.fixture(scope="module")
def head(aws_environment: None) -> Iterator[Head]:
    """A head with token authentication, as an engineer starts one."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # pytest's paths may be too long for sockets
        started = start_head(folder)
        yield started
        stop_head(started.process_id)


def submit(head: Head, environment: dict[str, str], *settings: str) -> "subprocess.CompletedProcess[str]":
    job = ["python", "-m", "jobs.pipeline", "--config", CONFIG, *(f"--set={setting}" for setting in settings)]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *job]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)


def test_a_job_without_the_token_is_refused(head: Head, tmp_path: Path) -> None:
    finished = submit(head, clean_environment(tmp_path / "home") | {"RAY_AUTH_MODE": "disabled"})
    assert finished.returncode != 0
    assert "401" in finished.stderr + finished.stdout or "nauthorized" in finished.stderr + finished.stdout
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=10)
    assert error.value.code == 401


def submit_on_s3(head: Head, storage: Storage, folder: Path, stages: str) -> dict[str, Any]:
    """Submit these stages as a job whose store is on S3; return the JSON that it printed."""
    settings = (f"storage.root={storage.root}", f"storage.endpoint={storage.endpoint}", f"run.scratch={folder / 'scratch'}")
    finished = submit(head, clean_environment(folder / "home") | head.environment, *settings, stages)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []
    stored = {found.uri.removeprefix(storage.root).split("/")[1] for found in storage.list(storage.root)}
    assert stored == {"raw", "datasets", "runs", "exports"}
    result: dict[str, Any] = next(json.loads(line) for line in reversed(finished.stdout.splitlines()) if line.startswith('{"prepare_data"'))
    return result


def test_a_submitted_job_on_s3_gives_the_metrics_of_the_local_run(
    head: Head, moto_server: S3Server, local: dict[str, Any], tmp_path: Path
) -> None:
    storage, expected = moto_server.fresh_storage(), local["first"]
    result = submit_on_s3(head, storage, tmp_path, FROM_EVENTS_TO_EXPORT)
    assert result["prepare_data"]["fingerprint"] == expected["prepare_data"]["fingerprint"]
    assert result["train"]["validation"] == expected["train"]["validation"]
    assert result["train"]["checkpoint"].startswith(storage.root)
    assert result["evaluate"]["baselines"] == expected["evaluate"]["baselines"]
    assert result["export"]["alias"] == "production"


@pytest.mark.slow
def test_a_submitted_job_searches_as_the_local_run_does(head: Head, moto_server: S3Server, local: dict[str, Any], tmp_path: Path) -> None:
    storage, expected = moto_server.fresh_storage(), local["first"]
    result = submit_on_s3(head, storage, tmp_path, WITHOUT_SERVICE)
    assert result["prepare_data"]["fingerprint"] == expected["prepare_data"]["fingerprint"]
    for stage in ("train", "train_id_only"):
        assert result[stage]["validation"] == expected[stage]["validation"]
    assert result["evaluate_id_only"]["metrics"] == pytest.approx(expected["evaluate_id_only"]["metrics"], rel=1e-6)
    assert result["search"]["num_trials"] == 2
    assert result["search"]["winner"]["checkpoint"].startswith(storage.root)
