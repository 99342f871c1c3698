"""A run that begins with the weights of another one: what is carried over to a grown dataset, and the optimizer's state at each stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.ingest.prepare import prepare
from recsys.model.recommender import Recommender
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.checkpoints import store_of
from tests.datasets import open_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter
from tests.without_ray import patch_run_tasks, run_once

NUM_USERS, NUM_OLD, NUM_NEW = 60, 20, 6
SMALL_STEPS: dict[str, Any] = {"optimizer__learning_rate": 1e-12, "optimizer__weight_decay": 0.0}
"""A step that changes nothing beyond rounding, so that a checkpoint has the weights from before the first step."""


def write_events(path: Path, days: range, num_items: int, kinds: str = "") -> None:
    """Write an event a day for each user; with kinds (one letter each) also a kind and a value."""
    generator = np.random.default_rng(days.start)
    rows = ["user_id,item_id,timestamp" + ",event,value" * bool(kinds)]
    for user in range(NUM_USERS):
        for day in days:
            item = num_items - 1 - int(generator.integers(num_items)) if generator.random() < 0.3 else (user * 7 + day) % num_items
            more = f",{kinds[int(generator.integers(len(kinds)))]},{generator.integers(1, 6)}" if kinds else ""
            rows.append(f"u{user},i{item:03},{1_700_000_000 + day * 86_400 + user}{more}")
    path.write_text("\n".join(rows) + "\n")


def write_items(path: Path, num_items: int) -> None:
    rows = [f"i{item:03},{'new' if item >= NUM_OLD else 'abc'[item % 3]},{item / 7}" for item in range(num_items)]
    path.write_text("\n".join(["item_id,genre,price", *rows]) + "\n")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """A dataset, and the next version with new items and categories."""
    folder = tmp_path_factory.mktemp("versions")
    storage = Storage(str(folder / "store"))
    write_events(folder / "before.csv", range(12), NUM_OLD, "vb")
    write_events(folder / "day.csv", range(12, 14), NUM_OLD + NUM_NEW, "vb")
    write_items(folder / "items.csv", NUM_OLD)
    write_items(folder / "more.csv", NUM_OLD + NUM_NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        first = prepared(storage, folder, events="before.csv", items="items.csv")
        return first, prepared(storage, folder, events="day.csv", items="more.csv", base=first.uri)


def prepared(storage: Storage, folder: Path, base: str = "", **files: str) -> Dataset:
    values = {"storage.root": storage.root, "run.scratch": str(folder / "scratch"), "data.max_history": 10, "data.base": base}
    return prepare(load_config().with_values(values | {f"data.{key}": str(folder / file) for key, file in files.items()}), storage)


def train(config: Config) -> TrainingState:
    return Trainer(config, open_dataset(config), LocalReporter(), NextItem).run()


def trained(dataset: Dataset, folder: Path, num_workers: int = 1, **values: object) -> tuple[str, Config]:
    """Train in processes of their own; return the address of the last checkpoint, and the config."""
    sizes = {"training__num_workers": num_workers, "training__micro_batch_size": 16 // num_workers}
    config = dataset.complete(small_config(dataset, folder, **sizes | values))
    state = run_distributed(train, num_workers, config)[0]
    return store_of(config).uri(state.step), config


def loaded(dataset: Dataset, uri: str, folder: Path) -> Recommender:
    return load_trained(dataset.storage, uri, str(folder / "scratch"))[3]


@pytest.mark.parametrize(
    ("old", "new"),
    [((1, 2), (2, 1)), ((2, 0), (1, 3)), pytest.param((2, 3), (1, 2), marks=pytest.mark.slow)],
    ids=["1-to-2-workers", "zero-0-to-3", "zero-3-to-2"],
)
def test_scores_of_old_users_and_items_are_unchanged_after_the_tables_grew(
    versions: tuple[Dataset, Dataset], tmp_path: Path, old: tuple[int, int], new: tuple[int, int]
) -> None:
    first, second = versions
    assert second.manifest.num_items == NUM_OLD + NUM_NEW
    assert len(second.manifest.category_vocabulary) == len(first.manifest.category_vocabulary) + 1
    start, _ = trained(first, tmp_path, old[0], run__name="monday", training__max_steps=8, training__zero_stage=old[1])
    after, config = trained(
        second,
        tmp_path,
        new[0],
        run__name="tuesday",
        training__max_steps=1,
        training__zero_stage=new[1],
        training__start_from=start,
        **SMALL_STEPS,
    )
    before, grown = (build_predictor(config, dataset, loaded(dataset, uri, tmp_path)) for dataset, uri in ((first, start), (second, after)))
    users = Sequences.from_table(first.read_users(list(HISTORY_COLUMNS)))
    histories = [users[row : row + 1] for row in range(len(users))]
    is_old = np.flatnonzero(before.catalogue.train_count.numpy() > 0)
    assert len(is_old) == NUM_OLD
    scores = [each.score_catalogue(histories)[:, is_old] for each in (before, grown)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-6)
    predicted = [each.score(histories, [is_old] * len(histories)) for each in (before, grown)]
    assert predicted[0][0].keys() >= {"v", "rating", "like"}
    for one, other in zip(*predicted, strict=True):
        for task, values in one.items():
            np.testing.assert_allclose(other[task], values, rtol=0, atol=1e-6)


def test_a_model_of_behaviour_alone_becomes_one_with_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)
    storage = Storage(str(tmp_path / "store"))
    write_events(tmp_path / "views.csv", range(12), NUM_OLD + NUM_NEW)
    write_events(tmp_path / "labelled.csv", range(20, 30), NUM_OLD, "vb")
    write_items(tmp_path / "items.csv", NUM_OLD + NUM_NEW)
    views, labelled = (prepared(storage, tmp_path, events=name, items="items.csv") for name in ("views.csv", "labelled.csv"))
    assert (views.manifest.tasks, len(views.manifest.event_kinds)) == ((), 1)
    start, _ = trained(views, tmp_path, run__name="pretrained", training__max_steps=8)
    after, _ = trained(labelled, tmp_path, run__name="labelled", training__max_steps=1, training__start_from=start, **SMALL_STEPS)
    fresh, _ = trained(labelled, tmp_path, run__name="fresh", training__max_steps=1, **SMALL_STEPS)
    source, result, initial = (
        dict(loaded(dataset, uri, tmp_path).named_parameters()) for dataset, uri in ((views, start), (labelled, after), (labelled, fresh))
    )
    heads = {name for name in result if name.startswith(("ranker.heads", "ranker.biases"))} | {
        "user_encoder.event.weight",
        "user_encoder.value.weight",
    }
    for name in heads:
        torch.testing.assert_close(result[name], initial[name], rtol=0, atol=1e-6)
    for name in result.keys() - heads - {"item_encoder.sources.id.weight", "item_encoder.sources.categories.weight"}:
        torch.testing.assert_close(result[name], source[name], rtol=0, atol=1e-6)
    places = [{item: row for row, item in enumerate(["", *dataset.catalogue["item_id"].to_pylist()])} for dataset in (views, labelled)]
    assert places[0] != places[1]
    for item, row in places[1].items():
        ids = [weights["item_encoder.sources.id.weight"] for weights in (result, source)]
        torch.testing.assert_close(ids[0][row], ids[1][places[0][item]], rtol=0, atol=1e-6)
