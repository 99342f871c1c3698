"""The passes over written shards that statistics and the report come from."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.arrays import Integers
from recsys.config.data import DataConfig
from recsys.data.manifest import Dataset, DatasetManifest, last_rows
from recsys.data.sequences import Sequences
from recsys.ingest.partitions import Job, staged_withheld, write_shard
from recsys.ingest.passes import run_pass, write_shards_of
from recsys.ingest.report.counts import Limits, count_partition, merge_counts
from recsys.ingest.report.page import REPORT_NAME, Findings, make_report
from recsys.ingest.shuffle import read_table, write_table
from recsys.ingest.write.statistics import USED_COLUMNS, ItemTotals, TrainSpan, item_statistics, item_sums, read_histories, user_statistics
from recsys.store import join

_SUMS = "item-sums"
Outcome = dict[str, Any]


@dataclass(frozen=True)
class MeasureTask:
    """One partition's part in measuring: its shards' addresses, oldest version first, and what all partitions have in common."""

    partition: int
    users: tuple[str, ...]
    train: tuple[str, ...]
    num_kinds: int
    limits: Limits


@dataclass(frozen=True)
class Measured:
    """What the pass gives: shards of statistics, the statistics of all items, and what the report needs besides."""

    user_shards: list[Outcome]
    item_shards: list[Outcome]
    items: pa.Table
    counts: dict[str, Integers]
    limits: Limits


def measure(job: Job, written: Sequence[Outcome], num_kinds: int, num_items: int) -> Measured:
    """Measure the shards that each partition has written; call it with Ray initialised."""
    limits = Limits.merge([Limits(**outcome["limits"]) for outcome in written])
    users, train = ([_written(job, outcome, name) for outcome in written] for name in ("users", "train"))
    return _measure(job, users, train, limits, num_kinds, num_items)


def measure_version(job: Job, base: Dataset, written: Sequence[Outcome], num_items: int) -> Measured:
    """Measure an appended version whole: the shards that each partition has written, and those of the versions before."""
    users, train = (
        [_inherited(base, name, number) + _written(job, outcome, name) for number, outcome in enumerate(written)]
        for name in ("users", "train")
    )
    found = run_pass(job, "limits", partial(_find_limits, job), users)
    limits = Limits.merge([Limits(**outcome["limits"]) for outcome in found])
    return _measure(job, users, train, limits, len(base.manifest.event_kinds), num_items)


def _written(job: Job, outcome: Outcome, name: str) -> tuple[str, ...]:
    return (join(job.uri, outcome[name]["path"]),) if outcome[name] else ()


def _inherited(base: Dataset, name: str, partition: int) -> tuple[str, ...]:
    """Find one partition's shards of the older versions; every version names its shards by partition."""
    shards = base.manifest.users_shards if name == "users" else base.manifest.train_shards
    path = f"{name}/{partition:05d}.parquet"
    return tuple(join(base.sibling(shard.dataset or base.name), shard.path) for shard in shards if shard.path == path)


def _find_limits(job: Job, users: tuple[str, ...]) -> Outcome:
    table = _read(job, users, USED_COLUMNS)
    histories = read_histories(last_rows(table, "user_index")) if table is not None else None
    limits = Limits.of(histories, job.has_time) if histories is not None else Limits(None, None, None)
    return {"rows": 0 if histories is None else len(histories.items), "limits": asdict(limits)}


def _measure(
    job: Job, users: Sequence[tuple[str, ...]], train: Sequence[tuple[str, ...]], limits: Limits, num_kinds: int, num_items: int
) -> Measured:
    tasks = [MeasureTask(number, *shards, num_kinds, limits) for number, shards in enumerate(zip(users, train, strict=True))]
    measured = run_pass(job, "statistics", partial(measure_partition, job), tasks)
    occupied = [number for number, outcome in enumerate(measured) if outcome["rows"]]
    items = join_item_statistics(job, occupied, num_items, train_span(limits, job.data))
    return Measured(
        [measured[number]["user_statistics"] for number in occupied],
        write_shards_of(job, "statistics/items", items),
        items,
        merge_counts([outcome["counts"] for outcome in measured]),
        limits,
    )


def write_report(job: Job, manifest: DatasetManifest, measured: Measured) -> None:
    """Write the report beside the place of the manifest, which comes after it."""
    page = make_report(Findings(manifest, measured.counts, measured.limits, measured.items))
    job.storage.write_bytes(join(job.uri, REPORT_NAME), page.encode())


def train_span(limits: Limits, data: DataConfig) -> TrainSpan | None:
    """Return the span of the training interactions; training data ends at the time split's cut, or with the last of them."""
    if limits.train_times is None:
        return None
    first, last = limits.train_times
    return TrainSpan(first, last, data.validation_from if data.split == "time" and data.validation_from is not None else last)


def measure_partition(job: Job, task: MeasureTask) -> Outcome:
    """Write one partition's user statistics, stage its sums by item, and count for the report."""
    users = _read(job, task.users, USED_COLUMNS)
    if users is None:
        return {"rows": 0, "user_statistics": None, "counts": {}}
    histories = read_histories(last_rows(users, "user_index") if len(task.users) > 1 else users)
    span = train_span(task.limits, job.data)
    write_table(job.storage, job.staged(_SUMS, 0, task.partition), item_sums(histories, span))
    statistics = user_statistics(histories, task.num_kinds, span, job.data.session_gap_seconds)
    samples = _flat_samples(_read(job, task.train, ["user_index", "items", "events", "timestamps"]))
    return {
        "rows": len(histories.items),
        "user_statistics": write_shard(job, f"statistics/users/{task.partition:05d}.parquet", statistics),
        "counts": count_partition(histories, samples, staged_withheld(job), task.num_kinds, task.limits, job.data.session_gap_seconds),
    }


def _read(job: Job, shards: Sequence[str], columns: list[str]) -> pa.Table | None:
    tables = [read_table(job.storage, uri, columns) for uri in shards]
    return pa.concat_tables(tables) if tables else None


def _flat_samples(train: pa.Table | None) -> pa.Table:
    """Lay out the interactions of training samples one by one: user_index, item, time, event."""
    if train is None:
        nothing: Integers = np.zeros(0, np.int64)
        return pa.table({"user_index": nothing, "item": nothing, "time": nothing, "event": nothing})
    samples = Sequences.from_table(train).cast(items=np.int64, events=np.int64)
    users = samples.scalars["user_index"][samples.owners]
    return pa.table({"user_index": users, "item": samples.items, "time": samples.timestamps, "event": samples.events})


def join_item_statistics(job: Job, partitions: Iterable[int], num_items: int, span: TrainSpan | None) -> pa.Table:
    """Join the staged sums of the partitions that have any into the statistics of all items."""
    totals = ItemTotals(num_items, has_time=span is not None)
    for partition in partitions:
        totals.add(read_table(job.storage, job.staged(_SUMS, 0, partition)))
    return item_statistics(totals, span)
