"""Building the application: token, version, arguments, and the declarations next to the code."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from recsys.config import load_config
from recsys.config.service import ServiceConfig
from recsys.errors import UserError
from serve.app import build_app, read_arguments
from tests.exports import publish_export, service_config

ROOT = Path(__file__).parents[3]
TOKEN = "token-of-the-tests"


@pytest.mark.parametrize("token", [None, "", "  "])
def test_without_a_token_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    config = service_config(tmp_path)
    publish_export(config, "v1")
    monkeypatch.delenv("RECSYS_SERVICE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("RECSYS_SERVICE_TOKEN", token)
    with pytest.raises(UserError, match="export RECSYS_SERVICE_TOKEN="):
        build_app({"storage.root": config.storage.root})


def test_without_a_version_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_SERVICE_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"service\.alias = 'production': names no version"):
        build_app({"storage.root": str(tmp_path)})


def test_arguments_are_read_as_strings_and_as_yaml(tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text("[service]\nport = 9000\nmax_k = 7\n")
    strings = {"config": str(file), "service.max_k": "20", "service.alias": "candidate", "data.event_kinds": '["view", "buy"]'}
    values = {"config": str(file), "service.max_k": 20, "service.alias": "candidate", "data.event_kinds": ["view", "buy"]}
    config = read_arguments(strings)
    assert config == read_arguments(values)
    assert (config.service.port, config.service.max_k, config.service.alias) == (9000, 20, "candidate")
    assert read_arguments({"training.use_gpu": True}).training.use_gpu
    for wrong in ({"service.max_k": None}, {"service": {"max_k": 3}}, {"service.max_j": 3}):
        with pytest.raises(UserError, match=r"service"):
            read_arguments(wrong)


def test_configs_and_declarations_parse() -> None:
    assert load_config(ROOT / "serve/configs/local.toml").service == ServiceConfig()
    (application,) = ServeDeploySchema(**yaml.safe_load((ROOT / "serve/configs/service.yaml").read_text())).applications
    config = read_arguments({**application.args, "config": ROOT / application.args["config"]})
    assert (config.service.min_replicas, config.storage.root) == (2, "s3://your-bucket/recsys")
