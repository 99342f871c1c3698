"""What every reader in the comparison runs in, a process that reads by command; it imports nothing that a peer's environment may lack.

`python -m tests.benchmarks.peers.serving PEER OPTIONS` where OPTIONS is a JSON object. PEER names a module beside this one with a function
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
"""Of the generated dataset: the row's number over all shards."""

Form = Literal["arrays", "tensors", "ids"]
"""What a step is delivered as: flat arrays with offsets, zero-padded tensors, or the ids of its rows."""


class Step(NamedTuple):
    """What a peer delivered; `ids` where they were asked for."""

    num_rows: int
    ids: list[int]


class Peer(Protocol):
    """A reader of one epoch after another."""

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        """Read an epoch, or what is left of it at a position."""

    def position(self) -> Any:
        """Tell, as JSON, where to go on after the step that came last; None where the peer can only start anew."""


def main() -> None:
    """Pin this process, open the peer, and do what is asked."""
    options = json.loads(sys.argv[2])
    os.sched_setaffinity(0, options["cores"])
    module = importlib.import_module(f"tests.benchmarks.peers.{sys.argv[1]}")
    task = {"serve": serve, "first": time_to_first_step, "stop_at": stop_at, "ledger": keep_ledger}[options["task"]]
    task(module, options)


def answer(result: dict[str, Any]) -> None:
    """Print one line that the bench reads; peers may print others."""
    print("ANSWER " + json.dumps(result), flush=True)


def serve(module: Any, options: dict[str, Any]) -> None:
    """Read an epoch, or as much of it as a time limit allows, for each line of standard input."""
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
    """Read some steps and note the position."""
    peer: Peer = module.open_peer(options)
    steps = peer.steps("arrays", is_shuffled=True)
    for _ in itertools.islice(steps, options["num_steps"]):
        pass
    write_position(Path(options["position"]), options["num_steps"], peer)
    answer({})


def time_to_first_step(module: Any, options: dict[str, Any]) -> None:
    """Time the first step at a noted position, the opening of everything but the libraries included."""
    begin = time.perf_counter()
    peer: Peer = module.open_peer(options)
    next(go_on(peer, "arrays", json.loads(Path(options["position"]).read_text())))
    answer({"seconds": time.perf_counter() - begin})


def go_on(peer: Peer, form: Form, noted: dict[str, Any]) -> Iterator[Step]:
    """Go on where a note says; a peer without positions reads what was passed and throws it away."""
    steps = peer.steps(form, True, noted["position"])
    return steps if noted["position"] is not None else itertools.islice(steps, noted["num_steps"], None)


def keep_ledger(module: Any, options: dict[str, Any]) -> None:
    """Read one epoch as a training run would: a line per step, the position every some steps; go on where the last process was killed."""
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
    """Note the position; the file is whole at any moment."""
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"num_steps": num_steps, "position": peer.position()}))
    os.replace(partial, note)


if __name__ == "__main__":
    main()
