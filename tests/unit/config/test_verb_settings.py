"""No setting is ignored silently: every command reads each key, compares it with the artifact's config, or reports it."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from recsys.config import Config, load_config
from recsys.config.verb_settings import SEARCHED, STAGES, VERBS, contradictions, reads, refuse_contradictions, unread
from recsys.errors import UserError
from tune.space import search_space

ROOT = Path(__file__).parents[3]
CARRIED_BY = {
    "jobs.train": ("data.",),
    "jobs.plan_memory": ("data.",),
    "tune.search": ("data.",),
    "jobs.pretrain": ("data.",),
    "jobs.evaluate": ("data.", "model.", "optimizer.", "training.", "fairness.", "pretraining."),
    "jobs.export": ("data.", "model.", "optimizer.", "training.", "fairness.", "pretraining."),
    "serve.deploy": ("data.", "model.", "optimizer.", "training.", "fairness.", "pretraining."),
}


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


KEYS = sorted(keys())
INACTIVE = ("data.synthetic.", "data.test_f", "data.validation_f")
"""Keys of `data` that have no effect with its defaults: those of other splits and of the generator."""


def given(key: str) -> Config:
    """Return the default config with one key marked as given."""
    return load_config().as_given(frozenset({key}))


def value_of(config: Config, key: str) -> Any:
    tree: Any = config.model_dump(mode="json")
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_key_is_read_compared_or_named(verb: str) -> None:
    assert len(KEYS) > 150
    for key in KEYS:
        config = given(key)
        named = unread(verb, config)
        if reads(verb, key):
            is_inactive = verb == "jobs.prepare_data" and key.startswith(INACTIVE)
            assert named == (["data.*"] if is_inactive else []), key
            continue
        carried: dict[str, Any] = {}
        node = carried
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = "something else"
        is_compared = bool(contradictions(config, carried)) and key.startswith(CARRIED_BY.get(verb, ()))
        assert is_compared != bool(named), (verb, key)
        if named:
            assert named in ([key], [f"{key.partition('.')[0]}.*"])


@pytest.mark.parametrize("section", ["service", "search", "export", "run", "storage", "checkpoint"])
def test_what_nothing_carries_is_named_by_verbs_that_do_not_read_it(section: str) -> None:
    for verb in VERBS:
        for key in (key for key in KEYS if key.startswith(f"{section}.")):
            assert reads(verb, key) != bool(unread(verb, given(key))), (verb, key)


def test_keys_that_others_make_meaningless_are_named() -> None:
    assert unread("jobs.prepare_data", load_config(None, ["data.test_from=5", "data.k_core=2"])) == ["data.test_from"]
    split = ["data.split=time", "data.validation_from=1", "data.test_from=5", "data.test_fraction=0.5"]
    assert unread("jobs.prepare_data", load_config(None, split)) == ["data.test_fraction"]
    made = ["data.source=synthetic", "data.synthetic.seed=1", "data.csv.separator=;"]
    assert unread("jobs.prepare_data", load_config(None, made)) == ["data.csv.separator"]


def test_a_search_does_not_read_what_it_varies_and_pretraining_no_mode() -> None:
    assert set(search_space(load_config().search)) == set(SEARCHED)
    assert unread("tune.search", load_config(None, ["model.width=32", "model.num_layers=3"])) == ["model.width"]
    assert unread("jobs.pretrain", load_config(None, ["model.text.mode=lora", "model.text.pooling=mean"])) == ["model.text.mode"]


def test_how_a_run_was_computed_contradicts_nothing() -> None:
    machine = ["training.use_gpu=true", "training.zero_stage=3", "training.epochs=3"]
    config = load_config(None, [*machine, "evaluation.diversity_method=dpp", "evaluation.metric=hr@10"])
    other = load_config().model_dump(mode="json")
    assert contradictions(config, other) == []
    assert unread("jobs.evaluate", config) == ["training.*"]


def test_a_section_that_is_not_read_at_all_is_named_once() -> None:
    config = load_config(None, ["service.port=1", "service.max_k=2", "run.name=x", "run.scratch=y", "search.num_trials=2"])
    assert unread("jobs.evaluate", config) == ["run.name", "search.*", "service.*"]
    assert unread("jobs.train", config) == ["search.*", "service.*"]


def test_the_pipeline_reads_what_its_stages_read() -> None:
    assert set(STAGES.values()) < set(VERBS)
    config = load_config(None, ["run.stages=['prepare_data']", "search.num_trials=2", "data.k_core=2"])
    assert unread("jobs.pipeline", config) == ["search.*"]
    assert [key for key in KEYS if not reads("jobs.pipeline", key, STAGES)] == sorted(
        key
        for key in KEYS
        if key.startswith("pretraining.") or (not any(reads(verb, key) for verb in STAGES.values()) and key != "run.stages")
    )


def test_what_is_carried_may_be_given_again_and_nothing_else() -> None:
    config = load_config(None, ["model.width=32", "training.num_workers=1", "data.columns.user_id=who"])
    refuse_contradictions(config, {"model": {"width": 32}, "training": {"num_workers": 2}, "data": {"columns": {"user_id": "u"}}}, "x", "y")
    with pytest.raises(UserError) as error:
        refuse_contradictions(config, {"model": {"width": 64}}, "the checkpoint c", "train it")
    assert str(error.value) == "model.width = 32: the checkpoint c was made with 64; train it, or leave the key out"


def test_a_trial_of_a_search_has_values_of_its_own_which_are_told(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["model.width=32"])
    with caplog.at_level(logging.WARNING):
        refuse_contradictions(config, {"model": {"width": 64}}, "c", "d", "demo-trials/abc")
    with pytest.raises(UserError, match=r"training\.seed = 9: c was made with 0"):
        refuse_contradictions(load_config(None, ["training.seed=9"]), {"training": {"seed": 0}}, "c", "d", "demo-trials/abc")
    assert "model.width = 32 is not used: the trial demo-trials/abc was made with 64" in caplog.text


def test_given_keys_are_those_of_file_and_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[data]\ncolumns = { value = 'rating' }\n[model.text]\nmode = 'off'\n")
    config = load_config(tmp_path / "a.toml", ["training.epochs=3"])
    assert config.given == {"data.columns.value", "model.text.mode", "training.epochs"}
    assert config.with_values({"model.width": 32}).given == config.given
    assert load_config().given == frozenset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-01-01", 1704067200),
        ("2024-01-01T00:00:00Z", 1704067200),
        ("'2024-01-01 00:00:00 UTC'", 1704067200),
        ("1704067200", 1704067200),
    ],
)
def test_times_in_settings_may_be_iso(text: str, seconds: int) -> None:
    config = load_config(None, ["data.split=time", f"data.validation_from={text}", "data.test_from=2024-02-01T12:00:00+01:00"])
    assert (config.data.validation_from, config.data.test_from) == (seconds, 1706785200)
    assert load_config(None, [f"data.cleaning.min_time={text}"]).data.cleaning.min_time == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("soon", "must be seconds since 1970 or an ISO time (UTC where it names no zone); 1704067200 or 2024-01-01 would work"),
        ("1704067200000", "has too many digits for seconds; for milliseconds, 1704067200 would work"),
    ],
)
def test_the_error_names_key_unit_and_example(value: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [f"data.test_from={value}"])
    assert str(error.value).startswith("data.test_from = ")
    assert message in str(error.value)


def test_a_verb_names_what_it_does_not_read(tmp_path: Path) -> None:
    settings = ["--set=service.port=1", "--set=model.width=32", f"--set=run.scratch={tmp_path}"]
    finished = subprocess.run([sys.executable, "-m", "serve.stop", *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "serve.stop does not read model.*, service.*" in finished.stderr
    assert json.loads(finished.stdout) == {"stopped": False}
