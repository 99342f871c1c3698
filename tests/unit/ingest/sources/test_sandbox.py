"""The child process with a memory limit: it returns results and errors, is reused, and its failures do not affect this process."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.errors import UserError
from recsys.ingest.sources.sandbox import reading, run_limited

LIMIT = 256 << 20
KEPT: list[Any] = []


def child_id() -> int:
    return os.getpid()


def give_back(value: Any) -> Any:
    print("a print must not get between the answers")
    return value


def refuse() -> None:
    raise UserError("/data/events.csv: is wrong")


def stumble() -> None:
    raise AttributeError("a bug, not a file")


class Attack:
    """Runs in whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (13,)


def take_memory(num_bytes: int, is_arrow: bool, is_kept: bool) -> int:
    with reading("/data/large.parquet"):
        taken = pa.allocate_buffer(num_bytes) if is_arrow else np.ones(num_bytes, np.uint8)
        if is_kept:
            KEPT.append(taken)
    return num_bytes


def die_of(signal_number: int, last_words: str) -> None:
    with reading("/data/innocent.parquet"):
        pass
    with reading("/data/deadly.parquet"):
        os.write(2, last_words.encode())
        os.kill(os.getpid(), signal_number)


def die_before_reading() -> None:
    os._exit(3)


def sleep_for(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def raise_in_block(error: BaseException) -> None:
    with reading("/data/a.csv"):
        raise error


def test_results_come_back_and_the_child_is_used_again() -> None:
    assert run_limited(LIMIT, give_back, {"a": [1, None, "\u00e9"]}) == {"a": [1, None, "\u00e9"]}
    first = run_limited(LIMIT, child_id)
    assert first != os.getpid()
    assert run_limited(LIMIT, child_id) == first


def test_a_refusal_is_one_here_and_a_bug_is_no_refusal() -> None:
    with pytest.raises(UserError) as refusal:
        run_limited(LIMIT, refuse)
    assert str(refusal.value) == "/data/events.csv: is wrong"
    with pytest.raises(RuntimeError, match="a bug, not a file"):
        run_limited(LIMIT, stumble)


def test_what_a_child_returns_is_never_unpickled() -> None:
    with pytest.raises(RuntimeError, match="Unable to serialize unknown type"):
        run_limited(LIMIT, Attack)


@pytest.mark.parametrize("is_arrow", [True, False])
def test_memory_beyond_the_limit_is_refused_by_the_files_name(is_arrow: bool) -> None:
    assert run_limited(LIMIT, take_memory, 100 << 20, is_arrow, False) == 100 << 20
    with pytest.raises(UserError, match=r"^/data/large\.parquet: cannot be read within data\.max_file_memory_bytes"):
        run_limited(LIMIT, take_memory, LIMIT + (1 << 20), is_arrow, False)
    assert run_limited(2 * LIMIT, take_memory, LIMIT + (1 << 20), is_arrow, False)


def test_a_child_that_kept_memory_is_replaced() -> None:
    first = run_limited(LIMIT, child_id)
    run_limited(LIMIT, take_memory, LIMIT // 2, False, True)
    assert run_limited(LIMIT, take_memory, LIMIT * 3 // 4, False, False)
    assert run_limited(LIMIT, child_id) != first


def test_a_lower_limit_than_the_last_one_is_kept() -> None:
    run_limited(16 * LIMIT, take_memory, LIMIT, False, True)
    assert run_limited(LIMIT, take_memory, LIMIT * 3 // 4, False, False)


@pytest.mark.parametrize(
    ("signal_number", "last_words", "reason"),
    [
        (signal.SIGSEGV, "", "SIGSEGV: it wrote nothing"),
        (signal.SIGABRT, "terminate called after 'std::bad_alloc'\n  what(): it\n", "SIGABRT: terminate called after 'std::bad_alloc'"),
        (signal.SIGKILL, "", "SIGKILL"),
    ],
)
def test_a_death_is_refused_by_the_name_of_the_file_that_was_read(signal_number: int, last_words: str, reason: str) -> None:
    before = run_limited(LIMIT, child_id)
    with pytest.raises(UserError, match=rf"^/data/deadly\.parquet: .*{reason}"):
        run_limited(LIMIT, die_of, signal_number, last_words)
    assert run_limited(LIMIT, child_id) != before


def test_a_death_that_no_file_brought_about_is_no_refusal() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_limited(LIMIT, die_before_reading)


def test_the_child_knows_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("RECSYS_TEST_OF_SANDBOX", value)
        assert run_limited(LIMIT, os.getenv, "RECSYS_TEST_OF_SANDBOX") == value


def test_an_idle_child_that_was_killed_is_replaced() -> None:
    before = run_limited(LIMIT, child_id)
    os.kill(before, signal.SIGTERM)
    time.sleep(0.2)
    assert run_limited(LIMIT, child_id) != before


def test_an_interrupted_call_leaves_no_answer_to_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        run_limited(LIMIT, child_id)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            run_limited(LIMIT, sleep_for, 5.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert run_limited(LIMIT, give_back, 7) == 7


def test_threads_take_turns() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: run_limited(LIMIT, give_back, number), range(40))) == list(range(40))


def test_the_child_ends_with_its_parent_in_the_middle_of_a_call_too(tmp_path: Path) -> None:
    code = (
        "import threading, time\n"
        "from recsys.ingest.sources.sandbox import run_limited\n"
        "from test_sandbox import child_id, sleep_for\n"
        "print(run_limited(1 << 28, child_id), flush=True)\n"
        "run_limited(1 << 28, sleep_for, 60.0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/status")
    return status.exists() and "zombie" not in status.read_text()


def test_the_child_is_light() -> None:
    code = "import sys, recsys.ingest.input_tasks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pyarrow" in loaded
    assert not {"torch", "ray", "deepspeed", "transformers"}.intersection(loaded)


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("bad\nfooter"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
        KeyError("x"),
        OverflowError("big"),
        RecursionError(),
    ],
)
def test_whatever_a_decoder_raises_is_one_line_with_the_file(error: BaseException) -> None:
    with pytest.raises(UserError) as caught:
        raise_in_block(error)
    assert str(caught.value).startswith("/data/a.csv: cannot be read (")
    assert "\n" not in str(caught.value)


def test_a_refusal_without_a_name_gets_the_files() -> None:
    with pytest.raises(UserError) as caught:
        raise_in_block(UserError("column 'x': is a list"))
    assert str(caught.value) == "/data/a.csv: column 'x': is a list"
