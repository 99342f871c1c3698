"""The process that runs a reader of the comparison and reads on request; it imports only the standard library.

`python -m tests.benchmarks.peers.serving PEER OPTIONS` where OPTIONS is a JSON object. PEER is a module in this folder with a function
`open_peer(options) -> Peer`.
"""

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

COLUMNS = ("items", "events", "timestamps", "values", "first_target")
SEQUENCES = COLUMNS[:4]
ROW_ID = "user_index"
"""Column of the generated dataset with the row's number over all shards."""

Form = Literal["arrays", "tensors", "ids"]
"""Output of a step: flat arrays with offsets, zero-padded tensors, or row ids."""


class Step(NamedTuple):
    """A step of a peer; `ids` is empty unless the form is "ids"."""

    num_rows: int
    ids: list[int]


class Peer(Protocol):
    """A reader that can be used for several epochs."""

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        """Read an epoch, or the rest of it from a position."""

    def position(self) -> Any:
        """Return the position after the last step, as JSON-compatible data; None if the peer can only start from the beginning."""


def main() -> None:
    """Pin this process to its cores, open the peer, and run the task."""
    options = json.loads(sys.argv[2])
    os.sched_setaffinity(0, options["cores"])
    module = importlib.import_module(f"tests.benchmarks.peers.{sys.argv[1]}")
    task = {"serve": serve, "first": time_to_first_step, "stop_at": stop_at, "ledger": keep_ledger}[options["task"]]
    task(module, options)


def answer(result: dict[str, Any]) -> None:
    """Print one line for the benchmark; peers may print other lines."""
    print("ANSWER " + json.dumps(result), flush=True)


def serve(module: Any, options: dict[str, Any]) -> None:
    """For each line of standard input, read an epoch, or as much of it as the time limit allows."""
    peer: Peer = module.open_peer(options)
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        begin, num_rows = time.perf_counter(), 0
        for step in peer.steps(request["form"], request["is_shuffled"]):
            num_rows += step.num_rows
            if time.perf_counter() - begin > request["limit_seconds"]:
                break
        answer({"seconds": time.perf_counter() - begin, "num_rows": num_rows})


def stop_at(module: Any, options: dict[str, Any]) -> None:
    """Read `num_steps` steps and write the position."""
    peer: Peer = module.open_peer(options)
    steps = peer.steps("arrays", is_shuffled=True)
    for _ in itertools.islice(steps, options["num_steps"]):
        pass
    write_position(Path(options["position"]), options["num_steps"], peer)
    answer({})


def time_to_first_step(module: Any, options: dict[str, Any]) -> None:
    """Time the first step at a stored position, including opening the peer but not importing the libraries."""
    begin = time.perf_counter()
    peer: Peer = module.open_peer(options)
    next(go_on(peer, "arrays", json.loads(Path(options["position"]).read_text())))
    answer({"seconds": time.perf_counter() - begin})


def go_on(peer: Peer, form: Form, noted: dict[str, Any]) -> Iterator[Step]:
    """Continue at the stored position; a peer without positions reads and discards the earlier steps."""
    steps = peer.steps(form, True, noted["position"])
    return steps if noted["position"] is not None else itertools.islice(steps, noted["num_steps"], None)


def keep_ledger(module: Any, options: dict[str, Any]) -> None:
    """Read one epoch like a training run: write a line per step and the position every `every_steps` steps; resume after a kill."""
    peer: Peer = module.open_peer(options)
    note = Path(options["position"])
    noted: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"num_steps": 0, "position": None}
    ledger = os.open(options["ledger"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(ledger, f"resume {noted['num_steps']}\n".encode())
    numbers = range(noted["num_steps"], options["num_steps"])
    for number, step in zip(numbers, go_on(peer, "ids", noted), strict=False):
        os.write(ledger, f"{number} {' '.join(map(str, step.ids))}\n".encode())
        time.sleep(options["step_seconds"])
        if (number + 1) % options["every_steps"] == 0:
            write_position(note, number + 1, peer)
    os.write(ledger, b"end\n")


def write_position(note: Path, num_steps: int, peer: Peer) -> None:
    """Write the position atomically."""
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"num_steps": num_steps, "position": peer.position()}))
    os.replace(partial, note)


if __name__ == "__main__":
    main()
