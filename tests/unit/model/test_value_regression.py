"""The regression compared with a plain implementation at each position, and its output without any values."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.config.model import ModelConfig, RankerConfig
from recsys.data.batch import CPU_GROUP_COST, PackedHistories, map_tensors, pack
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.model.ranker import LEVEL_VARIANCE, NOISE_VARIANCE, Ranker, ValueRegression, build_regression
from recsys.schema import Kind, Task
from recsys.store import Storage
from tests.datasets import make_dataset

WIDTH, FACTORS = 6, 3
LENGTHS = np.array([7, 1, 4, 5])
CONFIG = ModelConfig(width=WIDTH, ranker=RankerConfig(kind="regression", num_factors=FACTORS, factor_dropout=0.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("values") / "store")))


@pytest.fixture
def regression(dataset: Dataset) -> ValueRegression:
    torch.manual_seed(0)
    built = build_regression(CONFIG, dataset.manifest)
    assert built is not None
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def draw_histories() -> tuple[PackedHistories, np.ndarray, Tensor, Tensor]:
    """Pack histories with about a third of the values unknown; return them, their first positions, and random vectors and states."""
    generator = np.random.default_rng(0)
    values = generator.integers(1, 6, LENGTHS.sum()).astype(np.float32)
    values[generator.random(len(values)) < 0.3] = np.nan
    columns = {"items": np.arange(1, 1 + len(values)), "values": values}
    packed, first_places = pack(Sequences(columns, np.cumsum(LENGTHS) - LENGTHS, LENGTHS), CPU_GROUP_COST)
    vectors, states = torch.randn(2, len(packed.items), WIDTH, generator=torch.Generator().manual_seed(1))
    return packed, first_places, vectors, states


def plain_weights(regression: ValueRegression, values: Tensor, vectors: Tensor, state: Tensor) -> Tensor:
    """Return the weights of a regression of one history's values, one by one, on the factors of its items."""
    precision = NOISE_VARIANCE * torch.eye(FACTORS + 1)
    prior = regression.prior.weight @ state
    evidence = NOISE_VARIANCE * prior
    for value, vector in zip(values, vectors, strict=True):
        if not value.isnan():
            bias, *rest = regression.factors.weight @ vector + regression.factors.bias
            factors = torch.stack([torch.tensor(LEVEL_VARIANCE**0.5), *rest])
            precision = precision + torch.outer(factors, factors)
            evidence = evidence + factors * ((value - regression.value_mean) / regression.value_std - bias)
    return torch.linalg.inv(precision) @ evidence


def test_the_weights_after_each_place_are_those_of_a_plain_regression_on_the_values_until_then(regression: ValueRegression) -> None:
    packed, first_places, vectors, states = draw_histories()
    places = np.concatenate([first + np.arange(length) for first, length in zip(first_places, LENGTHS, strict=True)])
    chosen = torch.from_numpy(places)
    found = regression(states[chosen], vectors, packed, chosen)
    row = 0
    for first, length in zip(first_places.tolist(), LENGTHS.tolist(), strict=True):
        for last in range(first, first + length):
            expected = plain_weights(regression, packed.values[first : last + 1], vectors[first : last + 1], states[last])
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
            row += 1


def test_without_values_the_sequence_alone_counts(regression: ValueRegression) -> None:
    packed, first_places, vectors, states = draw_histories()
    blank = map_tensors(packed, lambda tensor: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor)
    places = torch.from_numpy(first_places)
    torch.testing.assert_close(regression(states[places], vectors, blank, places), states[places] @ regression.prior.weight.T)


def test_only_tasks_of_values_are_scored_by_it(regression: ValueRegression) -> None:
    torch.manual_seed(0)
    tasks = (Task("purchase", "binary", "purchase"), Task("rating", "regression"), Task("like", "binary", threshold=4.0))
    ranker = Ranker(CONFIG, tasks, has_text=False, regression=regression)
    with torch.no_grad():
        ranker.scale.copy_(torch.tensor([9.0, 1.5, 2.0]))
        ranker.shift.copy_(torch.tensor([9.0, 0.1, -0.2]))
    packed, first_places, vectors, states = draw_histories()
    items, places = torch.randn(len(LENGTHS), WIDTH), torch.from_numpy(first_places + LENGTHS - 1)
    users = ranker.read_users(states[places], vectors, packed, places)
    scores = ranker(users, items)
    values = regression.predict(regression(states[places], vectors, packed, places), items)
    torch.testing.assert_close(scores[:, 1:], torch.stack([1.5 * values + 0.1, 2.0 * values - 0.2], 1))
    plain = Ranker(ModelConfig(width=WIDTH), tasks, has_text=False)
    plain.load_state_dict(ranker.state_dict(), strict=False)
    torch.testing.assert_close(scores[:, 0], plain(states[places], items)[:, 0])


def clicks(dataset: Dataset, columns: dict[str, Any]) -> ValueRegression:
    """Build the regression for exposures, clicks and purchases in histories, of which 20 % are taken."""
    kinds = (Kind("exposure", "exposure", marks_seen=False), Kind("click"), Kind("purchase"))
    tasks = (Task("click", "binary", "click"), Task("purchase", "binary", "purchase"))
    manifest = dataset.manifest.model_copy(
        update={
            "kinds": kinds,
            "event_kinds": tuple(kind.name for kind in kinds),
            "tasks": tasks,
            "value_mean": 0.2,
            "value_std": 0.4,
            "data_config": {"columns": columns},
        }
    )
    torch.manual_seed(0)
    built = build_regression(CONFIG, manifest)
    assert built is not None
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert [built.predicts(task) for task in tasks] == [True, False]
    return built


def weights_after(regression: ValueRegression, items: list[int], events: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights after one history of events, and the vectors of its items and the last state."""
    table = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    columns = {"items": np.array(items), "events": np.array(events)}
    packed, _ = pack(Sequences(columns, np.array([0]), np.array([len(items)])), CPU_GROUP_COST)
    vectors, state = table[packed.items], torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2))
    return regression(state, vectors, packed, torch.tensor([len(items) - 1]))[0], vectors, state[0]


def test_with_labels_a_row_is_a_value_of_one_or_zero(dataset: Dataset) -> None:
    regression = clicks(dataset, {"labels": {"click": "clicked", "purchase": "bought"}})
    found, vectors, state = weights_after(regression, [1, 2, 3, 3, 4], [0, 1, 1, 2, 0])
    values = torch.tensor([0.0, 1.0, 1.0, torch.nan, 0.0])  # a purchase is of the row that was clicked
    torch.testing.assert_close(found, plain_weights(regression, values, vectors, state), rtol=1e-4, atol=1e-5)


def test_in_a_log_a_click_turns_the_zero_of_its_exposure_into_a_one(dataset: Dataset) -> None:
    regression = clicks(dataset, {})
    found, vectors, state = weights_after(regression, [1, 2, 3, 3, 1, 4], [0, 0, 0, 1, 2, 0])
    values = torch.tensor([0.0, 0.0, torch.nan, 1.0, torch.nan, 0.0])
    torch.testing.assert_close(found, plain_weights(regression, values, vectors, state), rtol=1e-4, atol=1e-5)


def test_data_without_values_and_negatives_is_refused_with_what_to_do(dataset: Dataset) -> None:
    nothing = dataset.manifest.model_copy(update={"tasks": (Task("purchase", "binary", "purchase"),)})
    with pytest.raises(UserError, match="'regression' learns from values"):
        build_regression(CONFIG, nothing)
    assert build_regression(ModelConfig(width=WIDTH), nothing) is None
