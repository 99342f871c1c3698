"""`jobs.train` whose ranks record every sample that they train on, and kill themselves on request.

Run as `python -m tests.resume.ledger --set ...`. Below `run.scratch` it writes `ledger-{rank}`, and reads `kill-{rank}-{step}`, `pace`, the
minimum seconds per micro batch, and `poison-{step}`, which makes the step's loss NaN.
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
    """The next-item objective, which records each step as it passes it to the loop."""

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
    """Kill this process if a kill file exists for its rank and step; the file is deleted first."""
    order = scratch / f"kill-{rank}-{step}"
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def order_kills(scratch: Path, kills: Sequence[tuple[int, int]]) -> None:
    """Make each (rank, step) die the first time it starts the step."""
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    for rank, step in kills:
        (scratch / f"kill-{rank}-{step}").touch()


def read_ledger(scratch: Path, world_size: int) -> tuple[Ledger, dict[int, int]]:
    """Return the last record of each step, and how often rank 0 started each step."""
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
