"""`jobs.train` whose ranks write down every sample that they train on, and kill themselves where they are told to.

Run as `python -m tests.resume.ledger --set ...`. All by files below `run.scratch`: `ledger-{rank}`, `kill-{rank}-{step}`, `pace`, the
seconds that a micro batch shall take at least, and `poison-{step}`, which makes the step's loss no number.
"""

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.launch.command import run_verb
from recsys.model.text.catalogue_text import Ranks
from recsys.objectives.next_item import NextItem

Ledger = dict[tuple[int, int], list[int]]
"""What each rank trained on in each step of a run, by rank and step."""


class Recording(NextItem):
    """A recommender whose steps are written down as they are handed to the loop."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> None:
        super().__init__(config, dataset, device, ranks)
        self._scratch, self._unrecorded = Path(config.run.scratch), self.steps
        self.steps = self._recorded  # type: ignore[method-assign]
        self._number = 0
        self.module.register_forward_pre_hook(self._pace_where_told)
        self.module.register_forward_hook(self._poison_where_told)

    def _recorded(self, epoch: int, first_step: int = 0) -> Iterator[Sequence[Any]]:
        for number, batches in enumerate(self._unrecorded(epoch, first_step), epoch * self.plan(0).num_steps + first_step):
            ids = [sample for batch in batches for sample in batch.sample_ids.tolist()]
            entry = {"step": number, "ids": ids, "time": time.time()}
            with (self._scratch / f"ledger-{self._ranks.rank}").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            die_where_told(self._scratch, self._ranks.rank, number)
            self._number = number
            yield batches

    def _pace_where_told(self, module: object, inputs: object) -> None:
        with suppress(FileNotFoundError):
            if self.module.training:
                time.sleep(float((self._scratch / "pace").read_text() or 0))

    def _poison_where_told(self, module: object, inputs: object, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        is_poisoned = self.module.training and (self._scratch / f"poison-{self._number}").exists()
        return {name: loss * float("nan") for name, loss in losses.items()} if is_poisoned else losses


def die_where_told(scratch: Path, rank: int, step: int) -> None:
    """Kill this process if there is an order for its rank and step, which is then gone."""
    order = scratch / f"kill-{rank}-{step}"
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def order_kills(scratch: Path, kills: Sequence[tuple[int, int]]) -> None:
    """Have each (rank, step) die as it begins the step, the first time."""
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    for rank, step in kills:
        (scratch / f"kill-{rank}-{step}").touch()


def read_ledger(scratch: Path, world_size: int) -> tuple[Ledger, dict[int, int]]:
    """Return what counts of the ledger, each step as it was made last, and how often each step was begun by rank 0."""
    ledger: Ledger = {}
    times: dict[int, int] = defaultdict(int)
    for rank in range(world_size):
        for line in (scratch / f"ledger-{rank}").read_text().splitlines():
            entry = json.loads(line)
            ledger[rank, entry["step"]] = entry["ids"]
            times[entry["step"]] += rank == 0
    return ledger, dict(times)


def run(config: Config) -> dict[str, Any]:
    """Train with a ledger."""
    from recsys.launch.driver import launch
    from tests.resume.ledger import Recording as Imported  # workers find it by this name, and not in their own `__main__`

    return launch(config, Imported)


if __name__ == "__main__":
    run_verb("jobs.train", run, __doc__)
