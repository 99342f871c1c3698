"""The seeded generator of `data.source = "synthetic"`: a world of tastes, items and users, written as raw Parquet tables.

An event follows from what the user did last (half the time: the next parts of a series), else from the user's tastes,
which their group sets and time moves, and from the items' popularity. Titles and descriptions speak of the tastes.
"""

import hashlib
import json
import logging
import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.config import DataConfig, SyntheticConfig
from recsys.data.ray_tasks import run_tasks
from recsys.data.shuffle import write_table
from recsys.data.synthetic_world import World, build_world, describe_items
from recsys.storage import Storage, join

logger = logging.getLogger(__name__)
GENERATOR_VERSION = 1

_BLOCK_USERS = 500
_START = 1_700_000_000
_YEAR_SECONDS = 365 * 86_400
_GROUPS = ("north", "south", "west")
_CONTINUES_LAST = 0.5
_CONTINUES_EARLIER = 0.15
_SERIES_REACH = 3
_TRIES = 4
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def generate(data: DataConfig, storage: Storage) -> DataConfig:
    """Write the raw tables unless they are there, and return `data` with their addresses; call it with Ray initialised."""
    config = data.synthetic
    identity = json.dumps([GENERATOR_VERSION, config.model_dump(mode="json")], sort_keys=True)
    root = storage.uri("raw", f"synthetic-{hashlib.sha256(identity.encode()).hexdigest()[:12]}")
    marker = join(root, "complete.json")
    if not storage.exists(marker):
        write_table(storage, join(root, "items", "items.parquet"), describe_items(config))
        num_blocks = math.ceil(config.num_users / _BLOCK_USERS)
        outcomes = run_tasks("synthetic", partial(_write_block, storage, root, config), range(num_blocks))
        logger.info("synthetic: %d events below %s", sum(outcome["rows"] for outcome in outcomes), root)
        storage.create(marker, identity.encode())
    return data.model_copy(update={role: join(root, role) for role in ("events", "items", "users")})


def _write_block(storage: Storage, root: str, config: SyntheticConfig, block: int) -> dict[str, Any]:
    """Write one block of users and their events, which depend on the config and the block's number alone."""
    users, events = simulate_block(config, block)
    write_table(storage, join(root, "users", f"{block:05d}.parquet"), users)
    write_table(storage, join(root, "events", f"{block:05d}.parquet"), events)
    return {"rows": events.num_rows}


def simulate_block(config: SyntheticConfig, block: int) -> tuple[pa.Table, pa.Table]:
    """Simulate one block: (its users, their events)."""
    world = build_world(config)
    random = np.random.default_rng([config.seed, 1, block])
    first = block * _BLOCK_USERS
    num_users = min(_BLOCK_USERS, config.num_users - first)
    ids = np.array([f"u{number:07d}" for number in range(first + 1, first + num_users + 1)])
    groups = random.integers(len(_GROUPS), size=num_users)
    tastes = random.gamma(0.15 + 1.2 * world.group_tastes[groups])
    tastes /= tastes.sum(axis=1, keepdims=True)
    ages = np.clip(random.normal(25 + 12 * groups, 7), 16, 80).astype(np.int64)
    users = pa.table({"user_id": ids, "group": [_GROUPS[group] for group in groups], "age": ages})
    return users, _simulate_events(config, world, random, ids, tastes)


def _simulate_events(config: SyntheticConfig, world: World, random: np.random.Generator, ids: npt.NDArray[Any], tastes: Floats) -> pa.Table:
    num_users = len(ids)
    wanted = np.clip(random.lognormal(math.log(config.mean_events) - 0.18, 0.6, num_users), 5, config.num_items // 2).astype(np.int64)
    times = _START + random.uniform(0, _YEAR_SECONDS, num_users)
    history = np.full((num_users, wanted.max()), -1)
    columns: list[tuple[Integers, Integers, Floats]] = []
    for step in range(history.shape[1]):
        active = np.flatnonzero(wanted > step)
        times[active] += random.lognormal(10, 1.5, len(active))
        items = _choose(world, random, tastes[active], times[active], history[active, :step])
        history[active, step] = items
        happened = items >= 0
        columns.append((active[happened], items[happened], times[active][happened]))
    users, items = (np.concatenate([column[index] for column in columns]).astype(np.int64) for index in (0, 1))
    moments = np.concatenate([column[2] for column in columns]).astype(np.int64)
    kinds, values = _react(world, random, tastes[users], items)
    order = np.argsort(moments, kind="stable")
    table = {
        "user_id": ids[users[order]],
        "item_id": world.item_ids[items[order]],
        "timestamp": moments[order],
        "event": kinds[order],
        "value": pa.array(values[order], pa.float32(), from_pandas=True),
    }
    return pa.table(table)


def _choose(world: World, random: np.random.Generator, tastes: Floats, times: Floats, history: Integers) -> Integers:
    """Choose each user's next item, one that the user has not had; -1 where chance found none."""
    num_users = len(tastes)
    chosen = np.full(num_users, -1)
    for _ in range(_TRIES):
        items = _by_taste(world, random, tastes, times)
        luck = random.random(num_users)
        reach = random.integers(1, _SERIES_REACH + 1, num_users)
        for back, low, high in ((1, 0.0, _CONTINUES_LAST), (2, _CONTINUES_LAST, _CONTINUES_LAST + _CONTINUES_EARLIER)):
            if history.shape[1] >= back:
                before = history[:, -back]
                follows = (before >= 0) & (low <= luck) & (luck < high)
                items = np.where(follows, world.follow(before, reach), items)
        is_new = ~(history == items[:, None]).any(axis=1)
        chosen = np.where((chosen < 0) & is_new, items, chosen)
    return chosen


def _by_taste(world: World, random: np.random.Generator, tastes: Floats, times: Floats) -> Integers:
    """Draw a taste by the user's mix and the season, then one of its items by popularity."""
    phase = 2 * np.pi * ((times[:, None] - _START) / _YEAR_SECONDS + world.phases[None, :])
    weights = tastes * np.exp(0.8 * np.sin(phase))
    running = np.cumsum(weights, axis=1)
    taste = (random.random((len(tastes), 1)) * running[:, -1:] > running).sum(axis=1)
    return world.draw(taste, random.random(len(tastes)))


def _react(world: World, random: np.random.Generator, tastes: Floats, items: Integers) -> tuple[npt.NDArray[Any], Floats]:
    """Tell how far each event went (view, click, purchase) and its rating, NaN where none was given."""
    liking = np.einsum("nt,nt->n", tastes, world.item_tastes[items]) * tastes.shape[1] ** 0.5 + 0.5 * world.quality[items]
    drive = liking - 0.6 + random.logistic(0, 0.5, len(items))
    kinds = np.select([drive > 1.2, drive > 0.2], ["purchase", "click"], "view")
    ratings = np.clip(np.rint(3.2 + 1.1 * (liking - 0.8) + random.normal(0, 0.7, len(items))), 1, 5)
    is_rated = random.random(len(items)) < np.where(kinds == "view", 0.15, 0.7)
    return kinds, np.where(is_rated, ratings, np.nan)
