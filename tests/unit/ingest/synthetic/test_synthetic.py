"""The generator: blocks depend only on seed and number, and the data has the documented structure."""

from collections import Counter

import numpy as np
import pyarrow.compute as pc

from recsys.config.data import SyntheticConfig
from recsys.ingest.synthetic.events import block_users, simulate_block
from recsys.ingest.synthetic.world import THEMES, build_world, describe_items, taste_name

CONFIG = SyntheticConfig(num_users=700, num_items=120, mean_events=20, num_tastes=6)


def test_a_block_is_the_same_each_time_and_another_for_another_seed() -> None:
    config = CONFIG.model_copy(update={"num_users": block_users(CONFIG) + 200})
    users, events = simulate_block(config, 1)
    assert users.num_rows == 200
    assert simulate_block(config, 1)[1].equals(events)
    assert not simulate_block(config.model_copy(update={"seed": 1}), 1)[1].equals(events)
    assert not set(users["user_id"].to_pylist()) & set(simulate_block(config, 0)[0]["user_id"].to_pylist())


def test_no_user_has_an_item_twice_and_the_mean_is_near() -> None:
    users, events = simulate_block(CONFIG, 0)
    pairs = list(zip(events["user_id"].to_pylist(), events["item_id"].to_pylist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert 12 < events.num_rows / users.num_rows < 25
    assert min(Counter(events["user_id"].to_pylist()).values()) >= 3


def test_events_follow_the_series_far_more_often_than_chance() -> None:
    _, events = simulate_block(CONFIG, 0)
    world = build_world(CONFIG)
    number = {item: index for index, item in enumerate(world.item_ids.tolist())}
    by_user: dict[str, list[int]] = {}
    for user, item in zip(events["user_id"].to_pylist(), events["item_id"].to_pylist(), strict=True):
        by_user.setdefault(user, []).append(number[item])
    before, after = (np.array([item for items in by_user.values() for item in items[part]]) for part in (slice(0, -1), slice(1, None)))
    followers = np.stack([world.follow(before, np.full(len(before), reach)) for reach in (1, 2, 3)])
    assert (followers == after).any(axis=0).mean() > 0.4


def test_kinds_and_ratings_agree_with_liking() -> None:
    _, events = simulate_block(CONFIG, 0)
    rated = events.filter(events["value"].is_valid())
    means = {row["event"]: row["value_mean"] for row in rated.group_by("event").aggregate([("value", "mean")]).to_pylist()}
    assert means["view"] < means["click"] < means["purchase"]
    assert set(pc.unique(rated["value"]).to_pylist()) == {1, 2, 3, 4, 5}
    assert 0 < events["value"].null_count < events.num_rows


def test_titles_speak_of_the_main_taste() -> None:
    items, world = describe_items(CONFIG), build_world(CONFIG)
    assert items.column_names == ["item_id", "title", "description", "category", "price"]
    themes = list(THEMES)
    for title, main in zip(items["title"].to_pylist(), world.main_tastes, strict=True):
        assert any(noun in title for noun in THEMES[themes[main]][1].split())
    assert pc.count_distinct(items["title"]).as_py() > 100


def test_more_tastes_than_themes_have_names_of_their_own() -> None:
    names = [taste_name(taste) for taste in range(200)]
    assert len(set(names)) == 200


def test_tiny_worlds_work() -> None:
    config = SyntheticConfig(num_users=10, num_items=10, mean_events=40, num_tastes=30)
    users, events = simulate_block(config, 0)
    assert users.num_rows == 10
    assert events.num_rows >= 30
    assert describe_items(config).num_rows == 10
