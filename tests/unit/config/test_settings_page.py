"""Every setting has a docstring, which is shown by `--help` and on the settings page."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.config import Config
from recsys.config.base import fields_of, section_of
from recsys.config.help_text import help_text, page
from recsys.config.verb_settings import VERBS, reads

ROOT = Path(__file__).parents[3]
SETTINGS = {key: field for key, field, _ in fields_of(Config) if section_of(field) is None}


def test_every_setting_has_one_sentence() -> None:
    assert [key for key, field in SETTINGS.items() if not (field.description or "").endswith(".")] == []
    assert [key for key, field in SETTINGS.items() if "\n" in (field.description or "")] == []


def test_the_page_in_the_repository_is_the_one_that_the_docstrings_give() -> None:
    written = (ROOT / "recsys" / "config" / "README.md").read_text(encoding="utf-8")
    assert written == page(), "python -m recsys.config.help_text > recsys/config/README.md writes it anew"
    assert all(f"| `{key}` |" in written for key in SETTINGS)


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_what_a_verb_reads_within_a_second(verb: str) -> None:
    seconds = []
    for _ in range(2):  # the first run may have to compile the modules
        before = seconds_of_children()
        result = subprocess.run([sys.executable, "-m", verb, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(seconds_of_children() - before)
    listed = {line.split(" = ")[0].strip() for line in result.stdout.splitlines() if " = " in line and line.startswith("  ")}
    assert listed & set(SETTINGS) == {key for key in SETTINGS if reads(verb, key)}
    assert help_text(verb) in result.stdout
    assert min(seconds) < 1, "seconds of processor time"
