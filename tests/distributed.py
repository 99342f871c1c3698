"""Run a function on several real processes in a gloo group: distributed tests without Ray."""

import contextlib
import os
import queue
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys.launch.head import free_port


def _start_ranks(function: Callable[..., Any], world_size: int, arguments: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Start the ranks, forked from a process with the slow imports done; return the processes and the queue of their answers."""
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    results, port = context.Queue(), free_port()
    own = (os.getpid(), dict(os.environ))
    processes = [
        context.Process(target=_run_rank, args=(function, rank, world_size, port, results, arguments, *own)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 300) -> list[Any]:
    """Call `function(*arguments)` on every rank and return the results by rank; raise the error of a rank that fails."""
    processes, results = _start_ranks(function, world_size, arguments)
    try:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(answers) < world_size and not any(isinstance(answer, RankError) for answer in answers.values()):
            with contextlib.suppress(queue.Empty):
                rank, answer = results.get(timeout=1)
                answers[rank] = answer
                continue
            died = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in answers]
            if died or time.monotonic() > deadline:
                raise RankError(f"ranks {died} died" if died else f"no answer of all ranks in {timeout_seconds} s")
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    errors = [answer for answer in answers.values() if isinstance(answer, RankError)]
    if errors:
        raise errors[0]
    return [answers[rank] for rank in range(world_size)]


class RankError(RuntimeError):
    """An error on a rank, with its traceback."""


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    arguments: tuple[Any, ...],
    parent: int,
    environment: dict[str, str],
) -> None:
    for descriptor in (1, 2):  # the fork server's own stdout and stderr are those of the time when it was started
        os.dup2(os.open(f"/proc/{parent}/fd/{descriptor}", os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        answer = function(*arguments)
        dist.destroy_process_group()
    except BaseException:
        answer = RankError(f"rank {rank}: {traceback.format_exc()}")
    results.put((rank, answer))


def run_until_killed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120) -> None:
    """Call `function(*arguments)` on every rank until one kills itself, then kill the others, as a scheduler would."""
    processes, results = _start_ranks(function, world_size, arguments)
    try:
        died = connection.wait([process.sentinel for process in processes], timeout_seconds)
        assert died, "no rank died"
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    assert -signal.SIGKILL in codes, codes
    while not results.empty():
        rank, answer = results.get()
        assert isinstance(answer, RankError), f"rank {rank} came to its end: {answer}"
