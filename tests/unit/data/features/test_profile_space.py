from collections import Counter

import numpy as np
import pytest

from recsys.config.data import UserFeaturesConfig
from recsys.data.features.profiles import MAX_VALUES, ProfileSpace, common_values, fit_profiles, infer_kinds
from recsys.errors import UserError

USERS = [
    {"gender": "F", "age": "25", "likes": "rock|jazz", "bio": "I love old jazz", "height": "170.5", "taste": "0.5 1.0"},
    {"gender": "M", "age": "35", "likes": "jazz", "bio": "Old rock, and jazz!", "height": "180.5", "taste": "[1.5, 3.0]"},
    {"gender": "M", "age": "25", "likes": "rock", "bio": "", "taste": "1"},
    {"gender": "M", "age": "25", "bio": "something else"},
    {"gender": "F", "age": "35", "bio": "entirely"},
]


def counted(users: list[dict[str, str]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for user in users:
        for name, value in user.items():
            if value:
                found.setdefault(name, Counter())[value] += 1
    return found


@pytest.fixture
def space() -> ProfileSpace:
    features = UserFeaturesConfig(
        categories=("gender", "age", "likes"), text=("bio",), numbers=("age", "height"), vectors=("taste",), separator="|"
    )
    return fit_profiles(counted(USERS), features)


def categories(space: ProfileSpace, user: dict[str, str]) -> list[str]:
    return [space.vocabulary[index - 1] for index in space.encode([user]).flat("categories").tolist()]


def test_categories_lists_and_words_become_entries_of_the_vocabulary(space: ProfileSpace) -> None:
    assert categories(space, USERS[0]) == ["gender=F", "age=25", "likes=jazz", "likes=rock", "bio=jazz", "bio=old"]
    assert categories(space, USERS[1])[-2:] == ["bio=jazz", "bio=old"]  # "rock" and "and" occur in one text only


def test_missing_and_unknown_values_are_the_same_entry(space: ProfileSpace) -> None:
    nothing = ["gender=", "age=", "likes=", "bio="]
    assert categories(space, {}) == nothing
    assert categories(space, {"gender": "X", "age": "99", "likes": "polka", "bio": "unheard of"}) == nothing


def test_numbers_are_standardized_over_users_and_missing_ones_are_nan(space: ProfileSpace) -> None:
    numbers = space.encode(USERS).scalars["numbers"]
    ages, heights = np.array([25, 35, 25, 25, 35]), np.array([170.5, 180.5])
    np.testing.assert_allclose(numbers[:, 0], (ages - ages.mean()) / ages.std(), rtol=1e-6)
    np.testing.assert_allclose(numbers[:2, 1], (heights - heights.mean()) / heights.std(), rtol=1e-6)
    assert np.isnan(numbers[2:, 1]).all()
    np.testing.assert_allclose(numbers[:2, 2:], [[-1, -1], [1, 1]], rtol=1e-6)
    assert np.isnan(numbers[2:, 2:]).all()  # a vector of another length is none


def test_posted_columns_replace_the_known_ones(space: ProfileSpace) -> None:
    merged = space.merge(space.encode(USERS[:1]), {"gender": "M", "height": "180.5", "bio": "rock"})
    both = space.encode([USERS[0] | {"gender": "M", "height": "180.5", "bio": "rock"}])
    assert sorted(merged.flat("categories").tolist()) == sorted(both.flat("categories").tolist())
    np.testing.assert_array_equal(merged.scalars["numbers"], both.scalars["numbers"])


def test_new_values_follow_the_known_ones(space: ProfileSpace) -> None:
    later = space.extended(counted([{"gender": "X", "age": "25", "bio": "brand new"}, {"bio": "new again"}]))
    assert later.vocabulary[: len(space.vocabulary)] == space.vocabulary
    assert later.vocabulary[len(space.vocabulary) :] == ("gender=X", "bio=new")
    np.testing.assert_array_equal(later.encode(USERS).flat("categories"), space.encode(USERS).flat("categories"))


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({"1": 40, "18": 30, "56": 30}, ["numbers", "categories"]),
        ({str(number / 7): 1 for number in range(200)}, ["numbers"]),
        ({"0.1 0.2 1": 1, "0.3,0.4,1": 1}, ["vectors"]),
        ({"1,234": 1, "2,000": 1}, ["text"]),
        ({"F": 30, "M": 70}, ["categories"]),
        ({f"word{number} text": 1 for number in range(20)}, ["text"]),
        ({}, []),
    ],
)
def test_the_kind_follows_from_the_values(values: dict[str, int], kinds: list[str]) -> None:
    assert infer_kinds(Counter(values)) == kinds


def test_columns_that_are_not_configured_are_inferred_only_if_none_is() -> None:
    assert fit_profiles(counted(USERS), UserFeaturesConfig(categories=("gender",))).columns == ("gender",)
    assert set(fit_profiles(counted(USERS), UserFeaturesConfig()).columns) == {"gender", "age", "likes", "bio", "height", "taste"}


def test_the_most_frequent_values_are_kept() -> None:
    counts = Counter({f"v{number}": 1 for number in range(MAX_VALUES + 5)}) + Counter({"often": 9})
    assert "often" in common_values(counts, MAX_VALUES)
    assert len(common_values(counts, MAX_VALUES)) == MAX_VALUES


def test_a_missing_marker_does_not_change_a_column_of_numbers() -> None:
    space = fit_profiles({"age": Counter({str(age): 1 for age in range(20, 90)} | {"NaN": 3})}, UserFeaturesConfig())
    assert (space.numbers, space.categories) == (("age",), ())
    assert np.isnan(space.encode([{"age": "NaN"}, {"age": "inf"}]).scalars["numbers"]).all()
    assert space.encode([{"age": "1e300"}]).scalars["numbers"].tolist() == [[10.0]]


def test_values_are_spelled_as_requests_spell_them() -> None:
    space = fit_profiles({"age": Counter({"25.0": 9, "30.0": 9}), "vip": Counter({"True": 9, "False": 9})}, UserFeaturesConfig())
    assert {"age=25", "vip=true"} <= set(categories(space, {"age": "25", "vip": "true"}))
    assert categories(space, {"age": "25.0", "vip": "True"}) == categories(space, {"age": "25", "vip": "true"})


def test_columns_with_brackets_are_merged_and_vectors_need_numbers() -> None:
    space = fit_profiles({"income[usd]": Counter({"10": 9, "20": 9})}, UserFeaturesConfig(numbers=("income[usd]",)))
    merged, expected = space.merge(space.encode([{"income[usd]": "10"}]), {"income[usd]": "20"}), space.encode([{"income[usd]": "20"}])
    np.testing.assert_array_equal(merged.scalars["numbers"], expected.scalars["numbers"])
    with pytest.raises(UserError, match=r"data.user_features.vectors: column 'bio' has no list of numbers"):
        fit_profiles({"bio": Counter({"a b": 1})}, UserFeaturesConfig(vectors=("bio",)))


def test_each_category_knows_the_missing_entry_of_its_column(space: ProfileSpace) -> None:
    for index, name in enumerate(space.vocabulary, start=1):
        assert space.vocabulary[space.missing[index] - 1] == f"{name.partition('=')[0]}="
    assert space.missing[0] == 0


def test_a_space_without_columns_is_empty() -> None:
    assert not ProfileSpace()
    assert not fit_profiles({}, UserFeaturesConfig())
