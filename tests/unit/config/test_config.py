"""The config tree: defaults, files, overrides, and a one-line error for every mistake."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.config import Config, load_config
from recsys.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/configs/*.toml")) + sorted(ROOT.glob("cluster/*.toml")), ids=lambda path: path.name)
def test_every_toml_of_the_project_is_a_valid_config(path: Path) -> None:
    assert load_config(path)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[training]\nepochs = 3\nseed = 7\n[model.text]\nmode = 'off'\n")
    config = load_config(path, ["training.epochs=5", "data.event_kinds=['view', 'click']", "run.name=plain-text"])
    assert (config.training.epochs, config.training.seed, config.model.text.mode) == (5, 7, "off")
    assert config.data.event_kinds == ("view", "click")
    assert config.run.name == "plain-text"


def test_local_paths_become_absolute_and_uris_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["storage.root=s3://bucket/a", "run.scratch=here", "data.folder=../data"])
    assert config.storage.root == "s3://bucket/a"
    assert config.run.scratch == str(tmp_path / "here")
    assert Path(config.data.folder).is_absolute()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=1", "training.epoch: unknown key; did you mean training.epochs?"),
        ("trainig.epochs=1", "trainig: unknown key; did you mean training?"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1: Input should be greater than 0"),
        ("training.global_batch_size=100", "training.global_batch_size = 100 must be divisible by"),
        ("training.zero_stage=4", "training.zero_stage = 4: Input should be less than or equal to 3"),
        ("training.epochs=many", 'training.epochs = "many": Input should be a valid integer'),
        ("model.width=63", "model.width = 63 must be divisible by model.num_heads = 2; 64 would work"),
        ("data.split=time", "needs data.validation_from and data.test_from"),
        ("data.window_stride=99", "data.window_stride must be at most data.max_history"),
        ("evaluation.metric=ndcg@7", "ndcg@5, ndcg@10, ndcg@20, click.auc would work"),
        ("search.learning_rate=[1, 0.1]", "must be [low, high]"),
        ("service.min_replicas=9", "service.min_replicas = 9 must be at most"),
        ("training.shuffle_histories=true", "removes the times between interactions; set model.use_gaps=false"),
        ("run.name=../up", "run.name"),
        ("training=3", "must be section.key=value"),
        ("training.seed.x=3", 'training.seed = {"x": 3}: Input should be a valid integer'),
    ],
)
def test_a_mistake_gives_one_line_with_key_value_and_rule(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[training\n", "a = \xff\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.toml: is not valid TOML"):
        load_config(path)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_key_under_its_former_name_is_read(tmp_path: Path) -> None:
    saved = load_config().model_dump(mode="json")
    saved["evaluation"]["curve"] = [*saved["evaluation"].pop("fairness_curve"), "s3://other"]
    assert Config.model_validate(saved).evaluation.fairness_curve == ("s3://other",)
    assert Config.model_validate_json(json.dumps(saved)).evaluation.fairness_curve == ("s3://other",)
    saved["evaluation"]["baselines"] = ["matrix_factorisation", "sasrec"]
    assert Config.model_validate(saved).evaluation.baselines == ("matrix_factorization", "sasrec")
    path = tmp_path / "former.toml"
    path.write_text("[evaluation]\ncurve = ['s3://other']\n")
    config = load_config(path)
    assert (config.evaluation.fairness_curve, config.given) == (("s3://other",), {"evaluation.fairness_curve"})


def test_accumulation_is_derived() -> None:
    config = load_config(None, ["training.global_batch_size=128", "training.micro_batch_size=16", "training.num_workers=4"])
    assert config.training.accumulation_steps(4) == 2


def test_a_range_of_workers_keeps_the_global_batch() -> None:
    training = load_config(None, ["training.global_batch_size=24", "training.micro_batch_size=4", "training.num_workers=[1, 5]"]).training
    assert (training.min_workers, training.max_workers, training.is_elastic) == (1, 5, True)
    assert [training.accumulation_steps(workers) for workers in (1, 2, 3, 5)] == [6, 3, 2, 2]


@pytest.mark.parametrize("override", ["training.epoch=1", "optimizer.learning_rate=-1", "training.global_batch_size=100"])
@pytest.mark.parametrize("module", ["jobs.train", "tune.search"])
def test_a_verb_refuses_before_any_worker_starts(module: str, override: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, "-m", module, "--set", override], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(finished.stderr.strip().splitlines()) == 1
    assert finished.stderr.startswith("error: ")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of work, whatever else the machine does"
