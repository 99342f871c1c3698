"""A small dataset and the next version of it, made by the real passes."""

from pathlib import Path

import numpy as np
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_OLD, NUM_NEW = 60, 20, 6


def write_events(path: Path, days: range, num_items: int, kinds: str = "", first: int = 0) -> None:
    """Write an event a day for each user; with kinds (one letter each) also a kind and a value."""
    generator = np.random.default_rng(days.start)
    rows = ["user_id,item_id,timestamp" + ",event,value" * bool(kinds)]
    for user in range(NUM_USERS):
        for day in days:
            item = first + (int(generator.integers(num_items)) if generator.random() < 0.3 else (user * 7 + day) % num_items)
            more = f",{kinds[int(generator.integers(len(kinds)))]},{generator.integers(1, 6)}" if kinds else ""
            rows.append(f"u{user},i{item:03},{1_700_000_000 + day * 86_400 + user}{more}")
    path.write_text("\n".join(rows) + "\n")


def write_items(path: Path, num_items: int, first: int = 0) -> None:
    rows = [f"i{item:03},{'new' if item >= NUM_OLD else 'abc'[item % 3]},{item / 7}" for item in range(first, first + num_items)]
    path.write_text("\n".join(["item_id,genre,price", *rows]) + "\n")


def make_versions(folder: Path) -> tuple[Dataset, Dataset]:
    """Prepare a dataset, and the next version with new items and categories, without Ray."""
    storage = Storage(str(folder / "store"))
    write_events(folder / "before.csv", range(12), NUM_OLD, "vb")
    write_events(folder / "day.csv", range(12, 17), NUM_OLD + NUM_NEW, "vb")
    write_items(folder / "items.csv", NUM_OLD)
    write_items(folder / "more.csv", NUM_OLD + NUM_NEW)
    first = prepared(storage, folder, events="before.csv", items="items.csv")
    return first, prepared(storage, folder, events="day.csv", items="more.csv", base=first.uri)


def prepared(storage: Storage, folder: Path, base: str = "", **files: str) -> Dataset:
    """Prepare a dataset from files in `folder`, without Ray."""
    values = {"storage.root": storage.root, "run.scratch": str(folder / "scratch"), "data.max_history": 10, "data.base": base}
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        return prepare(load_config().with_values(values | {f"data.{key}": str(folder / file) for key, file in files.items()}), storage)
