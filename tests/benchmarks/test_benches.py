"""Every benchmark runs in its tiny form, and every command in BENCHMARKS.md has a benchmark with those options."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
BENCHES = {
    "run": [],
    "reading": ["--only", "ours", "torch_loader"],
    "live_shards": ["--rounds", "1", "--steps", "2"],
    "checkpointing": [
        *("--config", "jobs/configs/demo.toml", "--saves", "6", "--every", "2", "--set", "model.text.mode=off"),
        *("--set", "training.num_workers=1", "--set", "training.global_batch_size=4", "--set", "training.micro_batch_size=4"),
    ],
    "step_time": ["--config", "jobs/configs/demo.toml", "--blocks", "2", "--steps", "2"],
    "item_encoding": ["--steps", "1"],
    "profiles": [],
    "gpu_training": ["--blocks", "4", "--steps", "2"],
}
QUICK = ("run", "profiles", "live_shards", "item_encoding")
"""Benchmarks that `make test` runs; `make test-all` runs all."""

WITH_RAY = {
    "sequence_training": ["--rounds", "1", "--steps", "4"],
    "preparing": [],
    "recovery": [],
    "kills": [],
    "daily": [],
    "service": [],
}


def run(name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow, pytest.mark.ray] if name in WITH_RAY else [] if name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(name, options, id=name, marks=marks_of(name)) for name, options in (BENCHES | WITH_RAY).items()]
)
def test_a_bench_runs_in_its_tiny_form(name: str, options: list[str]) -> None:
    result = run(name, "--tiny", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1])


def test_every_command_of_the_results_still_starts() -> None:
    text = (FOLDER / "BENCHMARKS.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m tests\.benchmarks\.(\w+)([^`\n]*)", text)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py") if path != Path(__file__)}
    benches = {name for name, source in sources.items() if 'if __name__ == "__main__"' in source}
    assert commands
    assert {name for name, _ in commands} <= benches == BENCHES.keys() | WITH_RAY.keys()
    unknown = {(name, option) for name, rest in commands for option in re.findall(r"--[a-z-]+", rest) if f'"{option}"' not in sources[name]}
    assert unknown == set()
