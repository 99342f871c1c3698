"""A command's terminal shows only this project's lines; its log file has all output."""

import logging
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recsys import terminal

ROOT = Path(__file__).parents[2]
VERB = """
    import atexit, logging, os, subprocess, sys, warnings
    from recsys.errors import UserError
    from recsys.launch.command import run_verb

    def run(config):
        atexit.register(print, "printed at the end")
        print("printed by a library")
        os.write(2, b"written by native code\\n")
        subprocess.run(["sh", "-c", "echo said by a child >&2"], check=True)
        warnings.warn("warned by a library")
        logging.getLogger("ray.train").warning("logged by a library")
        print("(RayTrainWorker pid=7) [recsys] I told by a worker")
        logging.getLogger("recsys.train").info("told by the driver")
        logging.getLogger("recsys.train").debug("a detail")
        if "{how}" == "mistake":
            raise UserError("data.events = x:\\n no such file")
        if "{how}" == "failure":
            raise RuntimeError("something broke")
        if "{how}" == "exit":
            os._exit(1)
        if "{how}" == "kill":
            os.kill(os.getpid(), 9)
        return {{"answer": 1}}

    run_verb("serve.stop", run, None)
"""
HIDDEN = ("printed by a library", "written by native code", "said by a child", "warned by a library", "logged by a library", "a detail")


def run(tmp_path: Path, how: str, *arguments: str) -> "tuple[subprocess.CompletedProcess[str], str]":
    script = textwrap.dedent(VERB.format(how=how))
    command = [sys.executable, "-c", script, "--set", f"run.scratch={tmp_path}", *arguments]
    finished = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    logs = list((tmp_path / "logs").glob("serve.stop-*.log"))
    return finished, logs[0].read_text() if logs else ""


def test_the_terminal_has_own_lines_and_the_log_everything(tmp_path: Path) -> None:
    finished, log = run(tmp_path, "well")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == '{"answer": 1}\n'
    *lines, at_the_end = finished.stderr.splitlines()
    assert at_the_end == "printed at the end"  # goes to stderr, so that stdout ends with the result
    lines = [line[9:] for line in lines]
    assert sorted(lines[:2]) == ["I told by a worker", "I told by the driver"]
    (last,) = lines[2:]
    assert last.startswith("I serve.stop took ")
    assert last.endswith(".log")
    assert [text for text in HIDDEN if text not in log] == []
    assert "told by the driver" in log
    assert "told by a worker" in log


@pytest.mark.parametrize(
    ("how", "status", "line"),
    [("mistake", 2, "error: data.events = x: no such file"), ("failure", 1, "error: RuntimeError: something broke; the traceback is in ")],
)
def test_a_failure_is_one_line_and_its_traceback_is_in_the_log(tmp_path: Path, how: str, status: int, line: str) -> None:
    finished, log = run(tmp_path, how)
    assert (finished.returncode, finished.stdout) == (status, "")
    assert next(each for each in finished.stderr.splitlines() if "told by" not in each).startswith(line)
    assert len(finished.stderr.splitlines()) == 4
    assert ("RuntimeError: something broke" in log and "Traceback" in log) == (how == "failure")


@pytest.mark.parametrize(("how", "status"), [("exit", 1), ("kill", -9)])
def test_an_end_without_a_last_line_names_the_log(tmp_path: Path, how: str, status: int) -> None:
    """Ray's native code ends a driver in this way, for example if it cannot register with the node."""
    finished, _ = run(tmp_path, how)
    assert finished.returncode == status
    assert finished.stdout == ""
    assert "error: the process ended unexpectedly; its last output is in" in finished.stderr.splitlines()[-1]
    assert str(tmp_path / "logs" / "serve.stop-") in finished.stderr.splitlines()[-1]


def test_verbose_shows_everything_and_keeps_no_file(tmp_path: Path) -> None:
    finished, log = run(tmp_path, "well", "--verbose")
    assert log == ""
    assert finished.stdout == '{"answer": 1}\n'
    assert [text for text in HIDDEN[:-1] if text not in finished.stderr] == []


def test_a_scratch_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finished, _ = run(tmp_path / "file", "well")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stderr.startswith("error: ")


@pytest.mark.timeout(60)
def test_on_a_terminal_progress_is_replaced_and_other_lines_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    handler = terminal._Terminal(os.fdopen(writer, "w"))
    monkeypatch.setattr(terminal, "_SHOWN", [handler])
    handler.setFormatter(logging.Formatter("%(message)s"))
    terminal.show("I █··· step 1")
    terminal.show("I ██·· step 2")
    handler.handle(logging.LogRecord("recsys", logging.WARNING, "", 0, "look here", (), None))
    terminal.show("I ███· step 3")
    terminal.show("")
    read = b""
    while not read.endswith(b"step 3\r\n"):  # the kernel may deliver it in parts
        read += os.read(reader, 10_000)
    shown = read.decode()
    assert [part[-6:].strip() for part in shown.replace("\r\n", "\n").split("\n")] == ["step 2", "k here", "step 3", ""]
    assert shown.count("\x1b[2K") == 1
    os.close(reader)
