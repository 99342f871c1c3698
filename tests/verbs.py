"""Runs a verb as its users do, and measures what it takes by the processor's time, which other tests beside do not stretch."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_verb(verb: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run `python -m VERB` from the root; return how it ended, and its seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, "-m", verb, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def refusal_of(verb: str, *arguments: str) -> tuple[str, float]:
    """Run a verb that must refuse: exit status 2, one line besides warnings of keys, no result; return the line and the seconds."""
    finished, seconds = run_verb(verb, *arguments)
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    (line,) = (line for line in finished.stderr.splitlines() if "does not read" not in line)
    return line, seconds
