"""One rank that reads a dataset and records what it got; run by `test_reading.py`, which kills it.

A ledger line is an attempt, a step, a rank, and the step's samples as id=items; every POSITION_EVERY steps the position is saved.
"""

import json
import os
import sys
import time
from pathlib import Path

from recsys.config import load_config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.store import Storage

POSITION_EVERY = 5
GLOBAL_BATCH_SIZE = 24


def main() -> None:
    """Read from the position to the end of the epoch."""
    order = json.loads(sys.argv[1])
    dataset = Dataset.open(Storage(order["root"], order["endpoint"]), order["dataset"])
    values = {
        "run.scratch": order["scratch"],
        "training.global_batch_size": GLOBAL_BATCH_SIZE,
        "training.micro_batch_size": 4,
        "training.num_workers": order["world_size"],
        "training.prefetch_bytes": 20_000,
    }
    config = load_config().with_values(values)
    share = Share(order["rank"], order["world_size"], config.training.accumulation_steps(order["world_size"]))
    reader = Reader(dataset, ItemFeatures.read(dataset), config, share)
    folder = Path(order["folder"])
    ledger = os.open(folder / f"ledger-{order['rank']}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for step, rows in enumerate(reader.rows(0, order["first_step"]), start=order["first_step"]):
        samples = [[sample, row.tolist()] for sample, row in zip(rows.scalars["sample_id"].tolist(), rows.split("items"), strict=True)]
        line = {"attempt": order["attempt"], "step": step, "rank": order["rank"], "samples": samples}
        os.write(ledger, (json.dumps(line) + "\n").encode())
        if (step + 1) % POSITION_EVERY == 0:
            new = folder / f"position-{order['rank']}.new"
            new.write_text(str(step + 1))
            new.replace(folder / f"position-{order['rank']}")
        time.sleep(order["pause_seconds"])


if __name__ == "__main__":
    main()
