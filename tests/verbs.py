"""Run a command in a subprocess and measure its CPU time, which does not depend on other load."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_verb(verb: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run `python -m VERB` from the root; return the finished process and its seconds of CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, "-m", verb, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def refusal_of(verb: str, *arguments: str) -> tuple[str, float]:
    """Run a command that must fail with exit status 2, no result and one error line; return that line and the seconds of CPU time."""
    finished, seconds = run_verb(verb, *arguments)
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    (line,) = (line for line in finished.stderr.splitlines() if "does not read" not in line)
    return line, seconds
