"""Start peers as processes, communicate with them, kill them, and evaluate their ledgers."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
OWN_ENVIRONMENT = ("huggingface", "mosaicml")
"""Peers with a separate environment, because their requirements conflict with the project's pins."""

START_SECONDS = 120
STEP_SECONDS = 0.002
EVERY_STEPS = 20


def make_environment(folder: Path, requirements: Path = REQUIREMENTS) -> Path:
    """Create the virtual environment of some peers if it does not exist; return its interpreter."""
    python = folder / "venv" / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        for arguments in (["torch==2.13.0"], ["--requirement", str(requirements)]):
            subprocess.run([*pip, *arguments], check=True, stdout=sys.stderr)
        (folder / "installed").touch()
    return python


def run_module(python: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of this folder; its stderr is discarded unless RECSYS_BENCH_DEBUG is set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(
        [str(python), "-m", f"tests.benchmarks.peers.{module}", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if not os.environ.get("RECSYS_BENCH_DEBUG") else None,
        text=True,
        start_new_session=True,
    )


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read lines until the next answer; raise RuntimeError if the process ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ANSWER "):
            return dict(json.loads(line.removeprefix("ANSWER ")))
    raise RuntimeError(f"{process.args!r} ended with {process.wait()}; RECSYS_BENCH_DEBUG=1 shows what it said")


@contextmanager
def serving(python: Path, peer: str, options: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Run a peer that reads on each call of `ask`."""
    with talking(run_module(python, "serving", peer, json.dumps({**options, "task": "serve"}))) as process:
        yield process


@contextmanager
def talking(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Wait until a process is ready; end it after the block."""
    try:
        answer_of(process)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to a process and return its answer."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return answer_of(process)


def run_task(python: Path, peer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one task of a peer in a new process."""
    process = run_module(python, "serving", peer, json.dumps(options))
    try:
        return answer_of(process)
    finally:
        process.kill()
        process.wait()


def kill_and_count(python: Path, peer: str, options: dict[str, Any], folder: Path, num_steps: int, num_kills: int) -> dict[str, int]:
    """Kill a peer at random steps of one epoch and return the counts of lost and repeated rows."""
    ledger = folder / f"{peer}.ledger"
    settings = {
        "task": "ledger",
        "ledger": str(ledger),
        "position": str(folder / f"{peer}.position"),
        "num_steps": num_steps,
        "every_steps": EVERY_STEPS,
        "step_seconds": STEP_SECONDS,
    }
    moments = sorted(random.Random(0).sample(range(EVERY_STEPS, num_steps - 1), num_kills))
    for moment in [*moments, None]:
        process = run_module(python, "serving", peer, json.dumps({**options, **settings}))
        _wait_until(process, ledger, moment)
        process.kill()
        process.wait()
    return count_ledger(ledger.read_text(), options["num_rows"])


def _wait_until(process: subprocess.Popen[str], ledger: Path, step: int | None) -> None:
    """Wait until a process has taken the step, or, without a step, until it has ended."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        last = _last_line(ledger)
        if step is not None and last and last[0].isdigit() and int(last.split()[0]) >= step:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process.args!r} did not come to step {step}")
        time.sleep(0.001)
    if step is not None or _last_line(ledger) != "end":
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}; RECSYS_BENCH_DEBUG=1 shows what it said")


def _last_line(ledger: Path) -> str:
    if not ledger.exists():
        return ""
    with ledger.open("rb") as file:
        file.seek(max(0, ledger.stat().st_size - 4096))
        lines = file.read().decode().split("\n")
    return lines[-2] if len(lines) > 1 else ""


def count_ledger(text: str, num_rows: int) -> dict[str, int]:
    """Count the rows lost and repeated in one epoch, and the steps done twice.

    Steps after the position from which a process resumed do not count, as training also resumes from its checkpoint there.
    """
    kept: dict[int, list[str]] = {}
    num_redone = 0
    for line in text.split("\n")[:-1]:
        word, *rest = line.split()
        if word == "resume":
            rolled_back = [step for step in kept if step >= int(rest[0])]
            num_redone += len(rolled_back)
            for step in rolled_back:
                del kept[step]
        elif word != "end":
            kept[int(word)] = rest
    seen = Counter(row for rows in kept.values() for row in rows)
    return {"lost": num_rows - len(seen), "repeated": seen.total() - len(seen), "steps_redone": num_redone}
