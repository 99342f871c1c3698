"""Which rows of a new model's tables come from which rows of the weights that it starts from."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recsys.config import Config, load_config
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace
from recsys.data.manifest import DatasetManifest
from recsys.schema import Task
from recsys.train.checkpoints.warm_start import Rows, carried, carry, id_rows, matched_rows, vocabularies

names = st.lists(st.text("abcde", max_size=3), unique=True, max_size=12)


def manifest_of(**values: Any) -> DatasetManifest:
    needed = {
        **dict.fromkeys(("num_users", "num_items", "num_interactions", "num_targets"), 9),
        **dict.fromkeys(("inputs", "tasks", "event_kinds", "category_vocabulary", "number_columns"), ()),
        **dict.fromkeys(("train_shards", "users_shards", "catalogue_shards"), ()),
        **{"fingerprint": "", "data_config": {}, "tie_rule": "", "rejected": {}, "value_mean": 0.0, "value_std": 1.0},
        **{"has_time": True, "num_streams": 1, "vector_size": 0},
    }
    return DatasetManifest(**{**needed, **values})


@given(old=names, new=names)
def test_each_row_comes_from_the_row_of_its_name(old: list[str], new: list[str]) -> None:
    expected = [old.index(name) if name in old else -1 for name in new]
    assert matched_rows(old, new).tolist() == expected
    in_parts = pa.chunked_array([new[:2], new[2:]], pa.string())
    assert matched_rows(pa.chunked_array([old], pa.string()), in_parts).tolist() == expected


def test_names_follow_the_dataset_and_the_config() -> None:
    tasks = (Task("buy", "binary", event="buy"), Task("rating", "regression"))
    manifest = manifest_of(event_kinds=("view", "buy"), tasks=tasks, category_vocabulary=("a", "b"), number_columns=("price",))
    config = load_config(None, ["data.max_history=3", "model.ranker.num_experts=2"])
    parameters = ["item_encoder.sources.vector.scale", "item_encoder.sources.id.weight", "ranker.heads.weight"]
    assert vocabularies(config, manifest, parameters) == {
        "categories": ["", "a", "b"],
        "numbers": ["value price", "presence price"],
        "sources": ["id", "vector"],
        "kinds": ["", "view", "buy"],
        "places": ["0", "1", "2"],
        "distances": ["0", "1", "2"],
        "tasks": ["buy binary", "rating regression"],
        "mixtures": ["0 buy binary", "0 rating regression", "1 buy binary", "1 rating regression"],
        "profile categories": [""],
        "profile numbers": [],
        "contexts": [],
    }
    shown = vocabularies(config, manifest.model_copy(update={"exposure_tasks": ("buy",), "tasks": ()}), parameters)
    assert shown["places"] == ["start", "0", "1", "2", "3"]
    assert (shown["tasks"], len(shown["distances"])) == ([""], 5)
    profiles = ProfileSpace(numbers=("age",), vectors={"taste": 2}, moments=((0, 1),) * 3, vocabulary=("sex=", "sex=F"))
    asked = manifest.model_copy(update={"profiles": profiles, "contexts": ContextSpace.of((), {"device": ["tv"]})})
    known = vocabularies(config.with_values({"model.use_profiles": True}), asked, parameters)
    assert known["places"] == ["start", "0", "1", "2"]
    assert known["profile categories"] == ["", "sex=", "sex=F"]
    assert known["profile numbers"] == [f"{part} {name}" for part in ("value", "presence") for name in ("age", "taste[0]", "taste[1]")]
    assert known["contexts"] == ["device=", "device=tv"]


@pytest.mark.parametrize(
    ("old", "new", "items", "expected"),
    [
        (0, 0, [0, 1, -1], [0, 1, 2, -1]),
        (0, 0, [1, -1, 0], [0, 2, -1, 1]),
        (7, 7, [0, 1, -1], list(range(7))),
        (7, 7, [1, 0], None),
        (7, 7, [0], None),
        (7, 8, [0, 1], None),
        (0, 7, [0, 1], None),
        (7, 0, [0, 1], None),
    ],
)
def test_ids_follow_the_items_and_hashed_ids_the_indices(old: int, new: int, items: list[int], expected: list[int] | None) -> None:
    configs: list[Config] = [load_config(None, [f"model.id_buckets={buckets}"]) for buckets in (old, new)]
    rows = id_rows(*configs, 2, np.array(items))
    assert (rows if rows is None else rows.tolist()) == expected


ROWS: Rows = {"tasks": np.array([1, -1, 0]), "items": None, "kinds": np.array([-1, -1])}


@pytest.mark.parametrize(
    ("name", "found", "shape", "expected"),
    [
        ("ranker.heads.weight", torch.tensor([[1.0], [2.0]]), (3, 1), [[2.0], [0.0], [1.0]]),
        ("ranker.display_bias", torch.tensor([[1.0, 2.0]]), (1, 3), [[2.0, 0.0, 1.0]]),
        ("ranker.biases.bias", torch.tensor([1.0, 2.0]), (3,), [2.0, 0.0, 1.0]),
        ("ranker.heads.weight", torch.ones(2, 2), (3, 1), "of another shape"),
        ("ranker.heads.weight", torch.ones(1, 1), (3, 1), "of another shape"),
        ("ranker.heads.weight", torch.ones(2, 1), (2, 1), "of another shape"),
        ("ranker.heads.weight", torch.ones(2), (3, 1), "of another shape"),
        ("user_encoder.event.weight", torch.ones(5, 1), (2, 1), "without a row of the same name"),
        ("item_encoder.sources.id.weight", torch.ones(2, 1), (2, 1), "of ids hashed by other catalogue indices"),
        ("user_encoder.norm_in.weight", torch.ones(2), (2,), [1.0, 1.0]),
        ("user_encoder.norm_in.weight", torch.ones(2), (3,), "of another shape"),
        ("user_encoder.norm_in.weight", None, (3,), "not in the source"),
    ],
)
def test_what_a_parameter_gets(name: str, found: torch.Tensor | None, shape: tuple[int, ...], expected: Any) -> None:
    values = carried(name, found, torch.zeros(shape), ROWS)
    assert (values if isinstance(values, str) else values.tolist()) == expected


def test_what_does_not_fit_stays_as_it_is_and_is_named() -> None:
    module = nn.ModuleDict({"one": nn.Linear(2, 1), "other": nn.Linear(2, 1)})
    before = module["other"].weight.detach().clone()
    weights = {"one.weight": torch.ones(1, 2), "one.bias": torch.ones(1), "other.weight": torch.ones(1, 3)}
    assert carry(weights, module, {}) == {"of another shape": ["other.weight"], "not in the source": ["other.bias"]}
    assert module["one"].weight.tolist() == [[1.0, 1.0]]
    assert torch.equal(module["other"].weight, before)
