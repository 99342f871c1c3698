"""Our reader compared with other readers of the same files, each in a separate process, in alternating rounds; no training."""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recsys.data.manifest import Dataset
from tests.benchmarks.peers.dataset import BUCKET, generate, served_copy
from tests.benchmarks.peers.processes import (
    OWN_ENVIRONMENT,
    answer_of,
    ask,
    kill_and_count,
    make_environment,
    run_module,
    run_task,
    serving,
)

BATCH_SIZE = 128
BUFFER_ROWS = 8192
LIMIT = "arrow_scan"
PEERS = (LIMIT, "ours", "torch_loader", "huggingface", "ray_data", "mosaicml")


@dataclass(frozen=True)
class Plan:
    """The measurements: (place, cores, pairs of form and is_shuffled), rounds, fractions of an epoch to resume from, repetitions."""

    num_rows: int
    row_group_rows: int
    settings: tuple[tuple[str, int, tuple[tuple[str, bool], ...]], ...]
    num_rounds: int
    limit_seconds: float
    fractions: tuple[float, ...]
    num_starts: int
    num_kills: int


SHUFFLED, ORDERED, PADDED = ("arrays", True), ("arrays", False), ("tensors", True)
FULL = Plan(
    num_rows=200_000,
    row_group_rows=4096,
    settings=(("local", 1, (SHUFFLED, ORDERED)), ("local", 2, (SHUFFLED, ORDERED, PADDED)), ("s3", 2, (SHUFFLED,))),
    num_rounds=3,
    limit_seconds=4.0,
    fractions=(0.01, 0.5, 0.9),
    num_starts=5,
    num_kills=3,
)
TINY = Plan(
    num_rows=4_000,
    row_group_rows=128,
    settings=(("local", 2, (SHUFFLED, PADDED)), ("s3", 2, (SHUFFLED,))),
    num_rounds=1,
    limit_seconds=0.2,
    fractions=(0.5,),
    num_starts=1,
    num_kills=1,
)


class Bench:
    """The dataset in both places, and the interpreters of the peers."""

    def __init__(self, plan: Plan, peers: list[str], environment: Path | None, folder: Path, stack: ExitStack) -> None:
        self.plan = plan
        self.peers = peers
        self._folder = folder
        own = make_environment(environment) if environment else Path(sys.executable)
        self._pythons = {peer: own if peer in OWN_ENVIRONMENT else Path(sys.executable) for peer in peers}
        local = generate(folder, plan.num_rows, plan.row_group_rows)
        self.conversion = self._convert(local) if "mosaicml" in peers else {}
        self._datasets = {"local": local, "s3": stack.enter_context(served_copy(local, folder))}

    def _convert(self, dataset: Dataset) -> dict[str, float]:
        files = json.dumps(self._files(dataset))
        process = run_module(self._pythons["mosaicml"], "mosaicml", files, str(self._folder / "buckets" / BUCKET / "mds"))
        return answer_of(process)

    def _files(self, dataset: Dataset) -> list[str]:
        return [dataset.address(shard).removeprefix("s3://") for shard in dataset.manifest.train_shards]

    def options(self, place: str, num_cores: int) -> dict[str, Any]:
        """Return the options of a peer's process."""
        dataset = self._datasets[place]
        local_mds = str(self._folder / "buckets" / BUCKET / "mds")
        return {
            "files": self._files(dataset),
            "endpoint": dataset.storage.endpoint or "",
            "root": dataset.storage.root,
            "dataset": dataset.uri,
            "scratch": str(self._folder / "scratch"),
            "mds": local_mds if place == "local" else f"s3://{BUCKET}/mds",
            "local_copy": str(self._folder / "copy"),
            "cores": list(range(num_cores)),
            "batch_size": BATCH_SIZE,
            "buffer_rows": min(BUFFER_ROWS, self.plan.num_rows // 4),
            "num_rows": self.plan.num_rows,
        }

    def measure_speed(self) -> list[dict[str, Any]]:
        """Read whole epochs, alternating between peers, after a warm-up round."""
        results = []
        for place, num_cores, cases in self.plan.settings:
            with ExitStack() as stack:
                options = self.options(place, num_cores)
                running = {peer: stack.enter_context(serving(self._pythons[peer], peer, options)) for peer in self.peers}
                for form, is_shuffled in cases:
                    speeds = self._in_turn(running, form, is_shuffled)
                    results += _speed_rows({"place": place, "cores": num_cores, "form": form, "is_shuffled": is_shuffled}, speeds)
        return results

    def _in_turn(self, running: dict[str, Any], form: str, is_shuffled: bool) -> dict[str, list[float]]:
        speeds = defaultdict(list)
        for round_number in range(self.plan.num_rounds + 1):
            limit_seconds = self.plan.limit_seconds if round_number else min(1.0, self.plan.limit_seconds)
            for peer, process in running.items():
                request = {"form": form, "is_shuffled": is_shuffled, "limit_seconds": limit_seconds}
                answer = ask(process, request)
                if round_number:
                    speeds[peer].append(answer["num_rows"] / answer["seconds"])
        return speeds

    def measure_first_step(self) -> list[dict[str, Any]]:
        """Time the first step of new processes at positions in the epoch that other processes have written."""
        num_steps = self.plan.num_rows // BATCH_SIZE
        cases = {
            (peer, fraction): {
                **self.options("local", 2),
                "position": str(self._folder / f"{peer}.{fraction}"),
                "num_steps": int(fraction * num_steps),
            }
            for peer, fraction in itertools.product(self._resumable(), self.plan.fractions)
        }
        for (peer, _), options in cases.items():
            run_task(self._pythons[peer], peer, {**options, "task": "stop_at"})
        seconds = defaultdict(list)
        for _ in range(self.plan.num_starts):
            for (peer, fraction), options in cases.items():
                seconds[peer, fraction].append(run_task(self._pythons[peer], peer, {**options, "task": "first"})["seconds"])
        return [
            {"peer": peer, "fraction": fraction, "seconds": statistics.median(values), "least": min(values), "greatest": max(values)}
            for (peer, fraction), values in seconds.items()
        ]

    def measure_kills(self) -> list[dict[str, Any]]:
        """Kill each peer several times in an epoch and count lost and repeated rows."""
        num_steps = -(-self.plan.num_rows // BATCH_SIZE)
        options = self.options("local", 2)
        results = []
        for peer in self._resumable():
            counts = kill_and_count(self._pythons[peer], peer, options, self._folder, num_steps, self.plan.num_kills)
            results.append({"peer": peer, **counts})
        return results

    def _resumable(self) -> list[str]:
        return [peer for peer in self.peers if peer != LIMIT]


def _speed_rows(setting: dict[str, Any], speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for peer, values in speeds.items():
        ratios = [limit / value for limit, value in zip(speeds[LIMIT], values, strict=True)]
        spread = {"times_limit": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        rows.append({**setting, "peer": peer, "rows_per_second": statistics.median(values), **spread})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table to stderr."""
    print(f"\n{title}", file=sys.stderr)
    if not rows:
        return
    cells = [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, list(rows[0]), strict=True)]
    for line in [list(rows[0]), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), file=sys.stderr)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def main() -> None:
    """Run all measurements; print tables to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small dataset and one round: shows that the bench runs, not how fast")
    parser.add_argument(
        "--peers", type=Path, help="folder for the environment of datasets and mosaicml-streaming; without it they are left out"
    )
    parser.add_argument("--rows", type=int, help="another size of the dataset: what a start costs weighs less in a larger one")
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, help="peers to measure; the limit always is")
    arguments = parser.parse_args()
    wanted = {LIMIT, *arguments.only}
    peers = [peer for peer in PEERS if peer in wanted and (arguments.peers or peer not in OWN_ENVIRONMENT)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        plan = TINY if arguments.tiny else FULL
        plan = replace(plan, num_rows=arguments.rows or plan.num_rows)
        bench = Bench(plan, peers, arguments.peers, Path(folder), stack)
        results: dict[str, Any] = {"speed": bench.measure_speed()}
        show("rows per second, and times the time of the limit (median, least, greatest)", results["speed"])
        results["first_step"] = bench.measure_first_step()
        show("seconds to the first step of a fresh process, libraries imported", results["first_step"])
        results["kills"] = bench.measure_kills()
        show("rows lost and repeated in an epoch with kills at random moments, steps done twice", results["kills"])
        results["conversion"] = bench.conversion
        show("mosaicml-streaming: conversion before reading", [bench.conversion] if bench.conversion else [])
    print(json.dumps({**results, "seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
