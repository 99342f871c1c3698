"""The `--tiny` form of the benchmarks: small inputs that test whether a benchmark runs, not its speed."""

import argparse
import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recsys.store import Storage
from tests.datasets import make_dataset

NUM_USERS = 120


def add_tiny(parser: argparse.ArgumentParser) -> None:
    """Add the option `--tiny`."""
    parser.add_argument("--tiny", action="store_true", help="a small input of its own: shows that the bench runs, not how fast")


@contextlib.contextmanager
def dataset_of(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the given dataset, or a tiny one that exists for the block."""
    if not arguments.tiny:
        yield arguments.dataset
        return
    with tempfile.TemporaryDirectory() as folder:
        yield make_dataset(Storage(str(Path(folder) / "store")), num_users=NUM_USERS).uri


def write_movies(folder: Path, num_users: int = 30, num_items: int = 60, length: int = 60) -> Path:
    """Write events and items in RecBole's files; return their folder."""
    folder = folder / "movies"
    folder.mkdir(parents=True)
    generator = random.Random(0)
    items = [f"{item}\tStory {item} of {generator.choice(['comedy', 'drama', 'western'])}" for item in range(1, num_items + 1)]
    (folder / "movies.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq", *items]) + "\n")
    events = [
        f"{user}\t{generator.randrange(1, num_items + 1)}\t{1_600_000_000 + 3600 * place}"
        for user in range(num_users)
        for place in range(length)
    ]
    (folder / "movies.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *events]) + "\n")
    return folder
