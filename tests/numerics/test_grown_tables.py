"""A run that begins with the weights of another one: what is carried over to a grown dataset, and the optimizer's state at each stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.export import run as export
from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.model.recommender import Recommender
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.checkpoints import store_of
from tests.datasets import make_dataset, open_dataset, small_config
from tests.distributed import RankError, run_distributed
from tests.reporters import LocalReporter
from tests.versions import NUM_NEW, NUM_OLD, make_versions, prepared, write_events, write_items

SMALL_STEPS: dict[str, Any] = {"optimizer__learning_rate": 1e-12, "optimizer__weight_decay": 0.0}
"""A step that changes nothing beyond rounding, so that a checkpoint has the weights from before the first step."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    return make_versions(tmp_path_factory.mktemp("versions"))


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
    ids=["export-1-to-2-workers", "zero-0-to-3", "zero-3-to-2"],
)
def test_scores_of_old_users_and_items_are_unchanged_after_the_tables_grew(
    versions: tuple[Dataset, Dataset], tmp_path: Path, old: tuple[int, int], new: tuple[int, int]
) -> None:
    first, second = versions
    assert second.manifest.num_items == NUM_OLD + NUM_NEW
    assert len(second.manifest.category_vocabulary) == len(first.manifest.category_vocabulary) + 1
    stages = [{"training__zero_stage": stage} for _, stage in (old, new)]
    start, config = trained(first, tmp_path, old[0], run__name=f"monday-{old[0]}-{old[1]}", training__max_steps=8, **stages[0])
    source = export(config.with_values({"export.checkpoint": start}))["uri"] if old == (1, 2) else start
    values = {"run__name": f"tuesday-{new[0]}-{new[1]}", "training__max_steps": 1, "training__start_from": source}
    after, config = trained(second, tmp_path, new[0], **values, **stages[1], **SMALL_STEPS)
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


def test_a_model_of_behaviour_alone_becomes_one_with_tasks(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    write_events(tmp_path / "views.csv", range(12), NUM_OLD + NUM_NEW)
    write_events(tmp_path / "labelled.csv", range(20, 30), NUM_OLD, "vb", first=NUM_NEW)
    write_items(tmp_path / "items.csv", NUM_OLD + NUM_NEW)
    write_items(tmp_path / "fewer.csv", NUM_OLD, first=NUM_NEW)
    views = prepared(storage, tmp_path, events="views.csv", items="items.csv")
    labelled = prepared(storage, tmp_path, events="labelled.csv", items="fewer.csv")
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


ONE_STEP = {
    "training__global_batch_size": 512,  # an epoch is one step, so that the order of samples is irrelevant
    "training__micro_batch_size": 256,
    "training__num_workers": 2,
    "training__early_stopping_patience": None,
    "optimizer__warmup_steps": 0,
    "optimizer__final_fraction": 1.0,
    "model__dropout": 0.0,
    "model__id_dropout": 0.0,
}


@pytest.mark.parametrize("stage", [2, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_with_the_optimizers_state_a_run_in_two_parts_equals_one_in_one(tmp_path: Path, stage: int) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    assert dataset.manifest.num_samples <= 512

    def weights(name: str, epochs: int, num_workers: int = 2, **values: object) -> tuple[str, dict[str, Tensor]]:
        sizes = ONE_STEP | {"training__num_workers": num_workers, "training__micro_batch_size": 512 // num_workers}
        uri, _ = trained(
            dataset, tmp_path, num_workers, run__name=name, training__epochs=epochs, training__zero_stage=stage, **sizes, **values
        )
        return uri, dict(loaded(dataset, uri, tmp_path).named_parameters())

    start, half = weights("half", 4)
    _, whole = weights("whole", 8)
    _, kept = weights("kept", 4, 4, training__start_from=start, training__keep_optimizer=True)
    _, anew = weights("anew", 4, 2, training__start_from=start)
    moved, off, lost = (max(float((one[name] - whole[name]).abs().max()) for name in whole) for one in (half, kept, anew))
    assert off < 1e-4
    assert min(lost, moved) > 1e-3


def test_weights_of_which_nothing_fits_are_refused_by_the_worker(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    start, _ = trained(dataset, tmp_path, run__name="wide", training__max_steps=1, model__width=32)
    with pytest.raises(RankError, match=r"has model\.width = 32, this run 16; set model\.width=32"):
        trained(dataset, tmp_path, run__name="narrow", training__start_from=start)
