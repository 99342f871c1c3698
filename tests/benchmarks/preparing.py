"""Memory and speed of prepare_data on synthetic logs of growing size, and the cost of a kill halfway; each run in a separate process.

`python -m tests.benchmarks.preparing --millions 2 20 --kill-halfway`
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.tiny import add_tiny

ROOT = Path(__file__).parents[2]
MEAN_EVENTS = 40
SAMPLE_SECONDS = 0.5


class MemorySampler(threading.Thread):
    """Sums the memory of a process and its descendants twice per second; keeps the peaks, and the processes' shares at the peak."""

    def __init__(self, process_id: int) -> None:
        super().__init__(daemon=True)
        self._root = process_id
        self._is_over = threading.Event()
        self.peak = {"pss": 0, "uss": 0}
        self.holders: dict[str, int] = {}

    def run(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            found = [(name, memory) for name, memory in map(_measure, _family(self._root)) if memory is not None]
            pss, uss = (sum(getattr(memory, kind) for _, memory in found) for kind in ("pss", "uss"))
            if pss > self.peak["pss"]:
                self.holders = {}
                for name, memory in found:
                    self.holders[name] = self.holders.get(name, 0) + memory.pss
            self.peak = {"pss": max(self.peak["pss"], pss), "uss": max(self.peak["uss"], uss)}

    def stop(self) -> None:
        """Stop sampling."""
        self._is_over.set()
        self.join()


def _family(process_id: int) -> list[psutil.Process]:
    """Return the program, its Ray head and their children; the head has its own session, but remains a child process."""
    try:
        process = psutil.Process(process_id)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _measure(process: psutil.Process) -> tuple[str, Any]:
    try:
        return _describe(process), process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return "", None


def _describe(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    for mark in ("jobs.prepare_data", "raylet/raylet", "gcs_server", "ray::", "default_worker", "sandbox", "dashboard", "monitor"):
        if mark in words:
            return mark
    return process.name()


def start(folder: Path, millions: float, overrides: Sequence[str]) -> "subprocess.Popen[str]":
    """Start prepare_data on a synthetic log, in a new process group."""
    settings = [
        f"storage.root={folder / 'store'}",
        f"run.scratch={folder / 'scratch'}",
        "data.source=synthetic",
        f"data.synthetic.num_users={int(millions * 1e6 / MEAN_EVENTS)}",
        "data.synthetic.num_items=20000",
        f"data.synthetic.mean_events={MEAN_EVENTS}",
        *overrides,
    ]
    command = [sys.executable, "-m", "jobs.prepare_data", *(f"--set={setting}" for setting in settings)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RECSYS_"))}
    log = (folder / "log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)


def finish(process: "subprocess.Popen[str]", folder: Path) -> dict[str, Any]:
    """Wait for the program and return the JSON that it prints last."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"prepare_data ended with {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(millions: float, overrides: Sequence[str]) -> dict[str, Any]:
    """Prepare one log, including its generation, and sample the memory of all processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        process = start(folder, millions, overrides)
        sampler = MemorySampler(process.pid)
        sampler.start()
        result = finish(process, folder)
        wall_seconds = time.monotonic() - begin
        sampler.stop()
    held = {name: round(num_bytes / 2**20) for name, num_bytes in sorted(sampler.holders.items(), key=lambda pair: -pair[1])}
    return {
        "millions": millions,
        "peak_pss_mib": round(sampler.peak["pss"] / 2**20),
        "peak_uss_mib": round(sampler.peak["uss"] / 2**20),
        "held_at_peak_mib": held,
        "num_interactions": result["num_interactions"],
        "seconds": result["seconds"],
        "wall_seconds": round(wall_seconds, 1),
        "rows_per_second": result["rows_per_second"],
        "fingerprint": result["fingerprint"],
    }


def kill_halfway(whole: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Kill the process group after half of the uninterrupted time, run it again and compare the fingerprints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(folder, whole["millions"], overrides)
        time.sleep(whole["wall_seconds"] / 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        result = finish(start(folder, whole["millions"], overrides), folder)
        return {
            "killed_after_seconds": round(whole["wall_seconds"] / 2, 1),
            "seconds_of_second_run": result["seconds"],
            "seconds_uninterrupted": whole["seconds"],
            "is_fingerprint_equal": result["fingerprint"] == whole["fingerprint"],
        }


def main() -> None:
    """Run each size; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, nargs="+", default=[2, 20], help="events of each log, in millions")
    parser.add_argument("--kill-halfway", action="store_true", help="also kill a run of the first size half-way and run it again")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    add_tiny(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.millions = [0.01, 0.02]
    runs = [measure(millions, arguments.overrides) for millions in arguments.millions]
    print("millions   peak PSS   peak USS   seconds    rows/s", file=sys.stderr)
    for run in runs:
        print(
            f"{run['millions']:>8g}{run['peak_pss_mib']:>7} MiB{run['peak_uss_mib']:>7} MiB"
            f"{run['seconds']:>10.1f}{run['rows_per_second']:>10,.0f}  {run['held_at_peak_mib']}",
            file=sys.stderr,
        )
    results: dict[str, Any] = {"runs": runs, "peak_ratio": round(runs[-1]["peak_pss_mib"] / runs[0]["peak_pss_mib"], 3)}
    if arguments.kill_halfway:
        results["kill_halfway"] = kill_halfway(runs[0], arguments.overrides)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
