"""Generates synthetic events of users who choose items by taste, as raw Parquet tables.

An event continues the series of the user's last item (probability 0.5) or of the item before it (0.15). Otherwise it is drawn by the
user's tastes, which depend on the user's group and the season, and by the items' popularity. Titles and descriptions name the tastes.
"""

import hashlib
import json
import logging
import math
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrays import Floats, Integers
from recsys.config.data import DataConfig, SyntheticConfig
from recsys.ingest.ray_tasks import Outcome, Record, run_tasks
from recsys.ingest.shuffle import write_table
from recsys.ingest.synthetic.world import World, build_world, describe_items
from recsys.store import Storage, join

logger = logging.getLogger(__name__)
GENERATOR_VERSION = 2

_BLOCK_EVENTS = 160_000
_LARGEST_BLOCK_USERS = 20_000
_START = 1_700_000_000
_YEAR_SECONDS = 365 * 86_400
_GROUPS = ("north", "south", "west")
_KINDS = ("view", "click", "purchase")
_CONTINUES_LAST = 0.5
_CONTINUES_EARLIER = 0.15
_SERIES_REACH = 3
_TRIES = 4


def generate(data: DataConfig, storage: Storage) -> DataConfig:
    """Write the raw tables unless they exist, and return `data` with their addresses; Ray must be initialized."""
    config = data.synthetic
    identity = json.dumps([GENERATOR_VERSION, config.model_dump(mode="json")], sort_keys=True)
    root = storage.uri("raw", f"synthetic-{hashlib.sha256(identity.encode()).hexdigest()[:12]}")
    marker = join(root, "complete.json")
    if not storage.exists(marker):
        write_table(storage, join(root, "items", "items.parquet"), describe_items(config))
        record = Record(storage, join(root, "outcomes"), Outcome)
        num_blocks = math.ceil(config.num_users / block_users(config))
        outcomes = run_tasks("synthetic", partial(_write_block, storage, root, config), range(num_blocks), record)
        logger.info("synthetic: %d events below %s", sum(outcome.rows for outcome in outcomes), root)
        storage.create(marker, identity.encode())
        storage.delete_tree(record.folder)
    return data.model_copy(update={role: join(root, role) for role in ("events", "items", "users")})


def block_users(config: SyntheticConfig) -> int:
    """Return how many users are simulated at once: enough for vectorized work, few enough for little memory."""
    return max(1, min(_LARGEST_BLOCK_USERS, int(_BLOCK_EVENTS / config.mean_events)))


def _write_block(storage: Storage, root: str, config: SyntheticConfig, block: int) -> Outcome:
    """Write one block of users and their events, which depend only on the config and the block's number."""
    users, events = simulate_block(config, block)
    write_table(storage, join(root, "users", f"{block:05d}.parquet"), users)
    write_table(storage, join(root, "events", f"{block:05d}.parquet"), events)
    return Outcome(rows=events.num_rows)


def simulate_block(config: SyntheticConfig, block: int) -> tuple[pa.Table, pa.Table]:
    """Simulate one block; return its users and their events."""
    world = build_world(config)
    random = np.random.default_rng([config.seed, 1, block])
    first = block * block_users(config)
    num_users = min(block_users(config), config.num_users - first)
    ids = pa.array([f"u{number:07d}" for number in range(first + 1, first + num_users + 1)])
    groups = random.integers(len(_GROUPS), size=num_users)
    tastes = random.gamma(0.15 + 1.2 * world.group_tastes[groups])
    tastes /= tastes.sum(axis=1, keepdims=True)
    ages = np.clip(random.normal(25 + 12 * groups, 7), 16, 80).astype(np.int64)
    users = pa.table({"user_id": ids, "group": [_GROUPS[group] for group in groups], "age": ages})
    return users, _simulate_events(config, world, random, ids, tastes)


def _simulate_events(config: SyntheticConfig, world: World, random: np.random.Generator, ids: pa.Array, tastes: Floats) -> pa.Table:
    num_users = len(ids)
    wanted = np.clip(random.lognormal(math.log(config.mean_events) - 0.18, 0.6, num_users), 5, config.num_items // 2).astype(np.int64)
    # Users with the most events come first, so that the users who are still active are always a prefix.
    owners = np.argsort(-wanted, kind="stable")
    wanted, tastes_of_owner = wanted[owners], tastes[owners]
    times = _START + random.uniform(0, _YEAR_SECONDS, num_users)
    history = np.full((wanted.max(), num_users), -1, np.int32)  # (steps, users)
    moments = np.zeros(history.shape, np.int64)
    for step in range(len(history)):
        num_active = int(np.searchsorted(-wanted, -step))
        times[:num_active] += random.lognormal(10, 1.5, num_active)
        history[step, :num_active] = _choose(world, random, tastes_of_owner[:num_active], times[:num_active], history[:step, :num_active])
        moments[step] = times
    happened = history >= 0
    users = np.broadcast_to(owners, history.shape)[happened]
    order = np.argsort(moments[happened], kind="stable")
    users, items = users[order], history[happened][order]
    kinds, values = _react(world, random, tastes[users], items)
    table = {
        "user_id": ids.take(pa.array(users)),
        "item_id": pa.array(world.item_ids).take(pa.array(items)),
        "timestamp": moments[happened][order],
        "event": pa.array(_KINDS).take(pa.array(kinds)),
        "value": pa.array(values, pa.float32(), from_pandas=True),
    }
    return pa.table(table)


def _choose(world: World, random: np.random.Generator, tastes: Floats, times: Floats, history: NDArray[np.int32]) -> Integers:
    """Choose each user's next item, one that the user has not had; -1 if none was drawn. `history` is (steps, users)."""
    chosen = np.full(len(tastes), -1)
    waiting = np.arange(len(tastes))
    for _ in range(_TRIES):
        of_waiting = history[:, waiting] if len(waiting) < len(tastes) else history
        items = _by_taste(world, random, tastes[waiting], times[waiting])
        luck = random.random(len(waiting))
        reach = random.integers(1, _SERIES_REACH + 1, len(waiting))
        for back, low, high in ((1, 0.0, _CONTINUES_LAST), (2, _CONTINUES_LAST, _CONTINUES_LAST + _CONTINUES_EARLIER)):
            if len(history) >= back:
                before = of_waiting[-back]
                follows = np.flatnonzero((before >= 0) & (low <= luck) & (luck < high))
                items[follows] = world.follow(before[follows], reach[follows])
        is_new = ~(of_waiting == items.astype(np.int32)).any(axis=0)
        chosen[waiting[is_new]] = items[is_new]
        waiting = waiting[~is_new]
    return chosen


def _by_taste(world: World, random: np.random.Generator, tastes: Floats, times: Floats) -> Integers:
    """Draw a taste by each user's mix of tastes and the season, then one of its items by popularity."""
    moments = ((times - _START) / _YEAR_SECONDS % 1.0 * len(world.seasons)).astype(np.int64)
    running = np.cumsum(tastes * world.seasons[moments], axis=1)
    taste = (random.random((len(tastes), 1)) * running[:, -1:] > running).sum(axis=1)
    return world.draw(taste, random.random(len(tastes)))


def _react(world: World, random: np.random.Generator, tastes: Floats, items: NDArray[np.int32]) -> tuple[Integers, Floats]:
    """Return the kind of each event (an index into _KINDS) and its rating, NaN if none was given."""
    liking = np.einsum("nt,nt->n", tastes, world.item_tastes[items]) * tastes.shape[1] ** 0.5 + 0.5 * world.quality[items]
    drive = liking - 0.6 + random.logistic(0, 0.5, len(items))
    kinds = (drive > 0.2).astype(np.int64) + (drive > 1.2)
    ratings = np.clip(np.rint(3.2 + 1.1 * (liking - 0.8) + random.normal(0, 0.7, len(items))), 1, 5)
    is_rated = random.random(len(items)) < np.where(kinds == 0, 0.15, 0.7)
    return kinds, np.where(is_rated, ratings, np.nan)
