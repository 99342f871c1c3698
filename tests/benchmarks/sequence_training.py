"""User sequences per second of `jobs.train` compared with RecTools' SASRec and a bare loop, and model quality after equal training time.

`python -m tests.benchmarks.sequence_training BEAUTY --peers FOLDER --quality 300`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.manifest import Dataset
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.users import EvaluationUser, read_evaluation_users
from recsys.ingest.write.splits import part_by_place
from recsys.store import Storage
from tests.benchmarks.peers.processes import ask, make_environment, run_module, talking
from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny, write_movies

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "peers" / "rectools_requirements.txt"
OURS, RECTOOLS, BARE = "jobs.train", "RecTools SASRec", "bare loop"
K = 10


@dataclass(frozen=True)
class Shape:
    """Settings that all contenders share."""

    max_history: int = 50
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.2
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0

    def settings(self) -> list[str]:
        """Return them as settings of our config: ids only, full softmax, one worker, no early stopping."""
        values = {
            "model.width": self.width,
            "model.num_layers": self.num_layers,
            "model.num_heads": self.num_heads,
            "model.dropout": self.dropout,
            "model.use_features": "false",
            "model.text.mode": "off",
            "model.loss.kind": "full",
            "optimizer.learning_rate": self.learning_rate,
            "training.num_workers": 1,
            "training.zero_stage": 0,
            "training.global_batch_size": self.batch_size,
            "training.micro_batch_size": self.batch_size,
            "training.seed": self.seed,
            "training.epochs": 10_000,
            "training.early_stopping_patience": 10_000,
            "checkpoint.every_steps": 1_000_000,
        }
        return [f"{key}={value}" for key, value in values.items()]


class Bench:
    """The dataset, and the processes of the contenders."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self._folder, self._num_threads, self._num_steps = folder, arguments.threads, arguments.steps
        self._own_settings = arguments.overrides
        shape, storage = Shape(), Storage(str(folder / "store"))
        self._places = [f"storage.root={storage.root}", f"run.scratch={folder / 'scratch'}"]
        uri = self._verb("prepare_data", f"data.folder={arguments.folder}", f"data.max_history={shape.max_history}")["dataset"]
        self.dataset = Dataset.open(storage, uri)
        self._settings = [f"data.dataset={uri}", f"training.cpus_per_worker={self._num_threads}", *shape.settings()]
        users = self.dataset.read_users(["num_train"])["num_train"].to_numpy()
        self.sequences_per_sample = int((users >= 2).sum()) / self.dataset.manifest.num_samples
        self.peers = {}
        options: dict[str, Any] = {"num_threads": self._num_threads}
        if arguments.peers:
            python = make_environment(arguments.peers / "rectools", REQUIREMENTS)
            options |= {"data": self._write_sequences(), "loss": arguments.loss, "num_negatives": 256}
            self.peers[RECTOOLS] = self._start(stack, python, "rectools_sasrec", {**asdict(shape), **options})
        options = {"num_threads": self._num_threads, "num_steps": self._num_steps}
        settings = [*self._places, *self._settings]
        self.peers[BARE] = self._start(stack, Path(sys.executable), "bare_loop", {**options, "settings": settings})

    def _start(self, stack: ExitStack, python: Path, module: str, options: dict[str, Any]) -> "subprocess.Popen[str]":
        return stack.enter_context(talking(run_module(python, module, json.dumps(options))))

    def _write_sequences(self) -> str:
        """Write all interactions with their split to a file that RecTools' process can read; return its path."""
        users = self.dataset.read_users(["user_index", "items", "num_train", "num_validation"])
        lists = users["items"].combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        part = part_by_place(offsets, users["num_train"].to_numpy(), users["num_validation"].to_numpy())
        owner, item = np.repeat(users["user_index"].to_numpy(), lengths), lists.flatten().to_numpy()
        np.savez(self._folder / "sequences.npz", user=owner, item=item, position=position, part=part)
        return str(self._folder / "sequences.npz")

    def _verb(self, name: str, *settings: str) -> dict[str, Any]:
        """Run a command in a subprocess and return the JSON that it prints."""
        command = [sys.executable, "-m", f"jobs.{name}", *(f"--set={setting}" for setting in (*self._places, *settings))]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RECSYS_"))}
        environment["OMP_NUM_THREADS"] = str(self._num_threads)
        log = self._folder / f"{name}.log"
        with log.open("w") as stderr:
            process = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
        if process.returncode:
            sys.exit(f"jobs.{name} ended with {process.returncode}: {log.read_text()[-3000:]}")
        return dict(json.loads(process.stdout.splitlines()[-1]))

    def train(self, run: str, num_steps: int, *settings: str) -> dict[str, Any]:
        """Run `jobs.train` for `num_steps` steps."""
        return self._verb("train", *self._settings, f"run.name={run}", f"training.max_steps={num_steps}", *settings)

    def measure_round(self, number: int, seconds: float) -> dict[str, float]:
        """Train each contender once, one after the other; return the user sequences per second of each."""
        rates = {}
        for name, process in self.peers.items():
            answer = ask(process, {"seconds": seconds})
            num_sequences = answer["num_sequences"] if name == RECTOOLS else answer["num_samples"] * self.sequences_per_sample
            rates[name] = num_sequences / answer["seconds"]
        rates[OURS] = self.train(f"round-{number}", self._num_steps)["samples_per_second"] * self.sequences_per_sample
        return rates

    def measure_quality(self, seconds: float, rate: float) -> list[dict[str, Any]]:
        """Train ours and RecTools for the same time and rank every test user's unseen items; `rate` is ours in sequences per second."""
        users = read_evaluation_users(self.dataset, "test")
        num_steps = steps_within(seconds, rate / self.sequences_per_sample, Shape().batch_size)
        trained = self.train("quality", num_steps, *self._own_settings)
        answer = self._verb("evaluate", f"evaluation.checkpoint={trained['checkpoint']}")
        if answer["num_users"] != len(users):
            raise RuntimeError(f"jobs.evaluate ranked for {answer['num_users']} users, not {len(users)}")
        num_sequences = trained["samples_seen"] * self.sequences_per_sample
        steps_seconds = trained["samples_seen"] / trained["samples_per_second"]
        rows = [_quality_row(OURS, steps_seconds, trained["seconds"], num_sequences, answer["metrics"])]
        if RECTOOLS in self.peers:
            request = {"seconds": seconds, "users": [user.user_index for user in users], "k": K}
            answer = ask(self.peers[RECTOOLS], request)
            metrics = metrics_of_lists(dict(answer["lists"]), users)
            rows.append(_quality_row(RECTOOLS, answer["seconds"], answer["wall_seconds"], answer["num_sequences"], metrics))
        return rows


def _quality_row(name: str, seconds: float, wall_seconds: float, num_sequences: float, metrics: dict[str, float]) -> dict[str, Any]:
    row = {"contender": name, "seconds_of_steps": seconds, "wall_seconds": wall_seconds, "sequences": round(num_sequences)}
    return row | {metric: round(metrics[metric], 4) for metric in (f"hr@{K}", f"ndcg@{K}")}


def steps_within(seconds: float, samples_per_second: float, batch_size: int) -> int:
    """Return how many steps fit into the time, at least one."""
    return max(1, int(seconds * samples_per_second / batch_size))


def metrics_of_lists(lists: dict[int, list[int]], users: Sequence[EvaluationUser]) -> dict[str, float]:
    """Return mean HR@K and NDCG@K for users with given ranked items, best first; a target that is not in the list is a miss.

    Raises:
        ValueError: a list has an item that its user has seen.
    """
    ranks: NDArray[np.int64] = np.full((len(users), max(len(user.targets.items) for user in users)), 0)
    for row, user in enumerate(users):
        ranked = lists.get(user.user_index, [])[:K]
        if set(ranked).intersection(user.history.items.tolist()):
            raise ValueError(f"user {user.user_index} is recommended what was seen")
        for column, target in enumerate(np.unique(user.targets.items).tolist()):
            ranks[row, column] = ranked.index(target) + 1 if target in ranked else K + 1
    return {name: float(values.mean()) for name, values in ranking_metrics(ranks, (K,)).items()}


def speed_rows(rounds: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Summarize the rounds: median, smallest and largest rate of each contender, and the same of the ratio of ours to it."""
    rows = []
    for name in rounds[0]:
        rates, ratios = [each[name] for each in rounds], [each[OURS] / each[name] for each in rounds]
        row = {"contender": name, "sequences_per_second": statistics.median(rates), "least": min(rates), "greatest": max(rates)}
        rows.append(row | {"ours_is_times": statistics.median(ratios), "times_least": min(ratios), "times_greatest": max(ratios)})
    return rows


def main() -> None:
    """Run everything; print tables to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="events and items of Amazon Beauty, as jobs.prepare_data reads them")
    parser.add_argument("--peers", type=Path, help="folder for RecTools' environment; without it RecTools is left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="steps of ours and of the bare loop in a round")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of RecTools in a round, after two steps")
    parser.add_argument("--threads", type=int, default=1, help="of each contender")
    parser.add_argument("--loss", default="sampled_softmax", help="RecTools', with 256 negatives: sampled_softmax, gBCE or BCE")
    parser.add_argument("--quality", type=float, help="then train ours and RecTools for so many seconds each, and rank the test users")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of our config, for --quality; repeatable")
    add_tiny(parser)
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arguments.folder = write_movies(Path(folder)) if arguments.tiny else arguments.folder.resolve()
        bench = Bench(arguments, Path(folder), stack)
        rounds = [bench.measure_round(number, arguments.seconds) for number in range(arguments.rounds)]
        results: dict[str, Any] = {"shape": asdict(Shape()), "threads": arguments.threads, "speed": speed_rows(rounds), "rounds": rounds}
        show("user sequences per second of training, and ours as a multiple", results["speed"])
        if arguments.quality:
            results["quality"] = bench.measure_quality(arguments.quality, min(each[OURS] for each in rounds))
            show(f"after {arguments.quality:.0f} s of steps: all items ranked, seen ones removed, leave-one-out", results["quality"])
    print(json.dumps({**results, "seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
