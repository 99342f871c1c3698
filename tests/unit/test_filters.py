"""Filters: against a plain evaluation of the same expression on each item, and what is refused."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.items import ItemFeatures
from recsys.data.manifest import DatasetManifest
from recsys.errors import UserError
from recsys.filters import MAX_CONDITIONS, MAX_DEPTH, ItemFilters
from recsys.store import Storage
from tests.datasets import GENRES, make_dataset

MEAN, DEVIATION = 1990.0, 12.5
YEARS = (1931.0, 1977.0, 1990.0, 1995.0, 2001.0)
NUM_ITEMS = 40


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[ItemFilters, list[dict[str, Any]]]:
    """Return the filters of a small catalogue, and its items as plain attributes, the padding item first."""
    dataset = make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_items=NUM_ITEMS)
    catalogue = ItemFeatures.read(dataset)
    years = np.array([[YEARS[item % len(YEARS)]] for item in range(NUM_ITEMS + 1)])
    has_year = np.array([[item % 7 > 0] for item in range(NUM_ITEMS + 1)])
    numbers = torch.tensor((years - MEAN) / DEVIATION, dtype=torch.float32)
    catalogue = replace(catalogue, numbers=numbers, has_number=torch.from_numpy(has_year))
    manifest: DatasetManifest = dataset.manifest.model_copy(update={"number_columns": ("year",), "number_moments": ((MEAN, DEVIATION),)})
    plain = [
        {"genre": [GENRES[index - 1] for index in categories if index]} | ({"year": year[0]} if known[0] else {})
        for categories, year, known in zip(catalogue.categories.tolist(), years.tolist(), has_year.tolist(), strict=True)
    ]
    return ItemFilters(catalogue, manifest), plain


def satisfies(item: Mapping[str, Any], expression: Mapping[str, Any]) -> bool:
    """Evaluate an expression on one item, in the plainest way."""
    return all(holds(item, key, value) for key, value in expression.items())


def holds(item: Mapping[str, Any], key: str, value: Any) -> bool:
    if key == "and":
        return all(satisfies(item, part) for part in value)
    if key == "or":
        return any(satisfies(item, part) for part in value)
    if key == "not":
        return not satisfies(item, value)
    if not isinstance(value, dict):
        value = {"in": value} if isinstance(value, list) else {"eq": value}
    own = item.get(key, [])
    own = own if isinstance(own, list) else [own]
    return all(compare(own, operator, operand) for operator, operand in value.items())


def compare(own: list[Any], operator: str, operand: Any) -> bool:
    if operator == "exists":
        return bool(own) == operand
    if operator in ("eq", "in", "ne", "not_in"):
        wanted = operand if isinstance(operand, list) else [operand]
        found = any(value in wanted for value in own)
        return found if operator in ("eq", "in") else not found
    if operator == "all":
        return all(value in own for value in operand)
    limits = {"gt": lambda x: x > operand, "gte": lambda x: x >= operand, "lt": lambda x: x < operand, "lte": lambda x: x <= operand}
    return bool(own) and limits[operator](own[0])


GENRE = st.sampled_from([*GENRES, "opera"])
YEAR = st.sampled_from([*YEARS, 1990, 1994.5])
CONDITIONS = st.one_of(
    st.fixed_dictionaries({"genre": st.one_of(GENRE, st.lists(GENRE, min_size=1, max_size=3))}),
    st.fixed_dictionaries({"genre": st.dictionaries(st.sampled_from(["in", "not_in", "all"]), st.lists(GENRE, min_size=1), min_size=1)}),
    st.fixed_dictionaries({"year": st.dictionaries(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), YEAR, min_size=1)}),
    st.fixed_dictionaries({"year": st.one_of(YEAR, st.lists(YEAR, min_size=1, max_size=3))}),
    st.fixed_dictionaries({"year": st.fixed_dictionaries({"exists": st.booleans()})}),
    st.fixed_dictionaries({"genre": st.fixed_dictionaries({"exists": st.booleans()}), "year": st.fixed_dictionaries({"gte": YEAR})}),
)
EXPRESSIONS = st.recursive(
    CONDITIONS,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"or": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=6,
)


@given(expression=EXPRESSIONS)
def test_a_mask_is_the_plain_evaluation(items: tuple[ItemFilters, list[dict[str, Any]]], expression: dict[str, Any]) -> None:
    filters, plain = items
    expected = [False, *(satisfies(item, expression) for item in plain[1:])]
    assert filters.mask(expression).tolist() == expected


def test_fields_are_the_attributes(items: tuple[ItemFilters, list[dict[str, Any]]]) -> None:
    filters, plain = items
    assert filters.columns == ("genre", "year")
    for item in range(1, NUM_ITEMS + 1):
        assert filters.fields(item) == {key: value for key, value in plain[item].items() if value != []}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ([], "filter: must be an object"),
        ({"colour": "red"}, "filter.colour: is not an attribute of the items; known: genre, year"),
        ({"genre": None}, "filter.genre.eq: must be a text or a number"),
        ({"genre": {}}, "filter.genre: has no condition"),
        ({"genre": []}, "filter.genre.in: must be a list of values"),
        ({"genre": {"gte": 3}}, "filter.genre.gte: is not a comparison of this attribute; known: eq, ne, in, not_in, all, exists"),
        ({"genre": {"like": "a"}}, "filter.genre.like: is not a comparison; known: eq, ne, in, not_in, all, exists, gt, gte, lt, lte"),
        ({"year": "new"}, "filter.year.eq: must be a number, as the attribute is"),
        ({"year": {"gte": "1990"}}, "filter.year.gte: must be a number"),
        ({"year": {"gte": True}}, "filter.year.gte: must be a number"),
        ({"year": {"exists": 1}}, "filter.year.exists: must be true or false"),
        ({"and": {}}, "filter.and: must be a list"),
        ({"or": [{"genre": "drama"}, {"x": 1}]}, "filter.or.1.x: is not an attribute"),
        ({"genre": ["x"] * (MAX_CONDITIONS + 1)}, f"the filter has more than {MAX_CONDITIONS} conditions"),
        (reduce(lambda inner, _: {"not": inner}, range(MAX_DEPTH), {"genre": "x"}), f"nested more than {MAX_DEPTH} levels"),
    ],
)
def test_wrong_expressions_are_refused_by_their_place(
    items: tuple[ItemFilters, list[dict[str, Any]]], expression: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        items[0].mask(expression)
    assert message in str(caught.value)
