"""The files in `cluster/`: each is valid for its reader, none allows open access, all name the pinned Ray. No cluster is started."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from recsys.config import load_config
from recsys.launch import haproxy

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
PANEL_SOURCES = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"

storage_files = sorted(CLUSTER.glob("*.toml"))
text_files = sorted(path for path in CLUSTER.iterdir() if path.is_file() and path.suffix != ".py")


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_cluster(name: str) -> dict[str, Any]:
    spec = read_yaml(name)["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def pod_specs(name: str) -> list[dict[str, Any]]:
    cluster = ray_cluster(name)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def set_values(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return [value for flag, value in itertools.pairwise(words) if flag == "--set"]


@pytest.mark.parametrize("path", storage_files, ids=lambda path: path.name)
def test_storage_fragment_is_a_config_with_only_storage(path):
    config = load_config(path)
    assert config.storage != load_config().storage or path.name == "storage-local.toml"
    assert config.model_dump(exclude={"storage"}) == load_config().model_dump(exclude={"storage"})


def test_storage_fragments_cover_the_three_kinds_of_store():
    roots = {path.name: load_config(path).storage for path in storage_files}
    assert set(roots) == {"storage-aws.toml", "storage-local.toml", "storage-minio.toml"}
    assert roots["storage-aws.toml"].root.startswith("s3://")
    assert roots["storage-aws.toml"].endpoint is None
    assert roots["storage-minio.toml"].root.startswith("s3://")
    assert roots["storage-minio.toml"].endpoint.startswith("http")
    assert Path(roots["storage-local.toml"].root).is_absolute()


@pytest.mark.parametrize("path", text_files, ids=lambda path: path.name)
def test_no_file_holds_a_credential(path):
    text = path.read_text()
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text)
    assert not re.search(r"(?i)(secret_?access_?key|auth_token|service_token|password)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}", text)


@pytest.mark.parametrize("path", text_files, ids=lambda path: path.name)
def test_every_ray_version_is_the_pinned_one(path):
    named = re.findall(r"(?i)\bray(?:Version)?[-:= \"'/a-z]*?(\d+\.\d+\.\d+)(?![.\d])", path.read_text())
    assert set(named) <= {RAY_VERSION}
    assert named or path.name not in {"Dockerfile", "ray-up-aws.yaml", "kuberay-rayjob.yaml", "kuberay-rayservice.yaml"}
    assert ray.__version__ == RAY_VERSION


def test_images_are_built_with_constraints_on_python_311_and_do_not_run_as_root():
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.search(rf"^ARG BASE=rayproject/ray:{re.escape(RAY_VERSION)}-py311-cpu$", text, re.MULTILINE)
    assert "-c /tmp/recsys/constraints.txt" in text
    assert "g++" in text
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users[-1] == "1000"
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert kept == copied


def test_ray_up_file_passes_rays_own_validation():
    config = prepare_config(read_yaml("ray-up-aws.yaml"))
    validate_config(config)
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] == config["max_workers"] == 8
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_ray_up_validation_refuses_an_unknown_key():
    config = prepare_config(read_yaml("ray-up-aws.yaml") | {"max_wrokers": 3})
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(config)


def test_ray_up_nodes_need_the_token_and_keep_the_dashboard_on_loopback():
    config = read_yaml("ray-up-aws.yaml")
    options = " ".join(config["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options
    token_path = re.search(r"--env RAY_AUTH_TOKEN_PATH=(\S+)", options).group(1)
    assert any(token_path.startswith(mount.replace("~", "/home/ray") + "/") for mount in config["file_mounts"])
    (head_start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head_start
    assert config["provider"]["use_internal_ips"] is True
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-rayservice.yaml"])
def test_kuberay_clusters_need_the_token_and_scale(name):
    cluster = ray_cluster(name)
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token", "secretName": "recsys-ray-token"}
    (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert gpu["minReplicas"] == 0 < gpu["maxReplicas"]
    assert int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0
    for spec in pod_specs(name):
        assert spec["securityContext"]["runAsNonRoot"] is True
        (container,) = spec["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "recsys-ray-token", "key": "auth_token"}}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == {volume["name"] for volume in spec.get("volumes", ())}


def test_rayjob_runs_the_pipeline_with_a_valid_config():
    spec = read_yaml("kuberay-rayjob.yaml")["spec"]
    assert spec["entrypoint"].startswith("python -m jobs.pipeline --config ")
    config = load_config(overrides=set_values(spec["entrypoint"]))
    assert (config.training.zero_stage, config.training.use_gpu, config.training.num_workers) == (3, True, 8)
    assert "serve" not in config.run.stages
    (gpu,) = ray_cluster("kuberay-rayjob.yaml")["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * gpu["maxReplicas"] >= config.training.num_workers
    assert int(limits["cpu"]) >= int(limits["nvidia.com/gpu"]) * config.training.cpus_per_worker
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].endswith(".zip")


def test_rayservice_deploys_the_service_with_a_valid_config_and_its_token():
    deploy = ServeDeploySchema.model_validate(yaml.safe_load(read_yaml("kuberay-rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = deploy.applications
    assert application.import_path == "serve.app:build_app"
    config = load_config().with_values(application.args)
    assert config.storage.root.startswith("s3://")
    assert config.service.port == deploy.http_options.port
    for spec in pod_specs("kuberay-rayservice.yaml"):
        env = {entry["name"]: entry for entry in spec["containers"][0]["env"]}
        assert "secretKeyRef" in env[config.service.token_env]["valueFrom"]
        expected = haproxy.environment(Path("/home/ray/haproxy"), (8404, 9101), config.service.request_timeout_seconds, 4)
        expected[haproxy.BINARY] = "/home/ray/anaconda3/bin/recsys-haproxy"
        assert {name: entry["value"] for name, entry in env.items() if name.startswith("RAY_SERVE_")} == expected


def test_prometheus_reads_rays_list_of_nodes():
    (scrape,) = read_yaml("prometheus.yml")["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert [Path(name).name for name in discovery["files"]] == [ray._private.ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE]


def test_dashboard_asks_only_for_metrics_that_rays_own_dashboards_ask_for():
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    without_labels = [re.sub(r"\bby \([^)]*\)|{[^}]*}", " ", expression) for expression in expressions]
    asked = {name for expression in without_labels for name in re.findall(r"\b(?:ray|autoscaler)_\w+", expression)}
    sources = "".join(path.read_text() for path in PANEL_SOURCES.glob("*_panels.py"))
    known = set(re.findall(r"\b((?:ray|autoscaler)_\w+)\{", sources))
    assert all(re.search(r"\b(?:ray|autoscaler)_", expression) for expression in without_labels)
    assert {name.split("_")[1] for name in asked} >= {"serve", "train", "node"}
    assert asked <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_readme_names_every_file_and_its_set_values_are_valid():
    readme = (CLUSTER / "README.md").read_text()
    for path in text_files:
        assert path.name == "README.md" or f"`{path.name}`" in readme
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", readme, re.MULTILINE | re.DOTALL)
    commands = [command for block in blocks for command in block.replace("\\\n", " ").splitlines() if "--set " in command]
    assert len(commands) >= 3
    assert f"export {ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR}=0" in readme
    for command in commands:
        assert load_config(overrides=set_values(command))
