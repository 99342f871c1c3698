"""Passes over the written shards that compute the statistics and the numbers of the report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Integers
from recsys.config.data import DataConfig
from recsys.data.manifest import DatasetManifest, Shard, last_rows
from recsys.data.sequences import Sequences
from recsys.ingest.job import Job, Limited, Measured, Written, present
from recsys.ingest.partition_tasks import staged_withheld
from recsys.ingest.shuffle import read_table, write_table
from recsys.ingest.write.feature_statistics import (
    USED_COLUMNS,
    ItemTotals,
    Shown,
    TrainSpan,
    item_statistics,
    item_sums,
    read_histories,
    user_statistics,
)
from recsys.ingest.write.report_counts import Limits, count_partition, merge_counts
from recsys.ingest.write.report_numbers import dataset_numbers
from recsys.report.pages import DATASET, write_report
from recsys.store import join

_SUMS = "item-sums"
SAMPLE_COLUMNS = ["user_index", "items", "events", "timestamps"]
EXPOSED = ("exposed_items", "exposed_labels", "exposed_known")


@dataclass(frozen=True)
class MeasureTask:
    """One partition to measure: the addresses of its shards, oldest version first, and settings that all partitions share."""

    partition: int
    users: tuple[str, ...]
    train: tuple[str, ...]
    num_kinds: int
    has_exposures: bool
    limits: Limits


@dataclass(frozen=True)
class Measurements:
    """Results of measuring: shards of statistics, the statistics of all items, and counts and limits for the report."""

    user_shards: list[Shard]
    item_shards: list[Shard]
    items: pa.Table
    counts: dict[str, Integers]
    limits: Limits


def measure(job: Job, written: Sequence[Written], num_kinds: int, num_items: int, has_exposures: bool) -> Measurements:
    """Measure the written shards of each partition and, for an appended version, those of the older versions."""
    users = [_shards_of(job, "users", outcome.users, number) for number, outcome in enumerate(written)]
    train = [_shards_of(job, "train", outcome.train, number) for number, outcome in enumerate(written)]
    found = written if job.base is None else job.run("limits", Limited, partial(_find_limits, job), users)
    limits = Limits.merge([outcome.limits for outcome in found])
    tasks = [MeasureTask(number, *shards, num_kinds, has_exposures, limits) for number, shards in enumerate(zip(users, train, strict=True))]
    measured = job.run("statistics", Measured, partial(measure_partition, job), tasks)
    occupied = [number for number, shards in enumerate(users) if shards]  # users may only have been shown things
    items = join_item_statistics(job, occupied, num_items, train_span(limits, job.data))
    return Measurements(
        present(outcome.user_statistics for outcome in measured),
        job.write_shards("statistics/items", items),
        items,
        merge_counts([outcome.counts for outcome in measured]),
        limits,
    )


def _shards_of(job: Job, name: str, written: Shard | None, partition: int) -> tuple[str, ...]:
    """Return the addresses of one partition's shards, older versions first; every version names its shards by partition."""
    manifest = job.base.manifest if job.base is not None else None
    older = () if manifest is None else manifest.users_shards if name == "users" else manifest.train_shards
    inherited = [job.base.address(shard) for shard in older if job.base is not None and shard.path == f"{name}/{partition:05d}.parquet"]
    return (*inherited, *((join(job.uri, written.path),) if written is not None else ()))


def _find_limits(job: Job, users: tuple[str, ...]) -> Limited:
    table = _read(job, users, USED_COLUMNS)
    if table is None:
        return Limited(rows=0, limits=Limits(None, None, None))
    histories = read_histories(last_rows(table, "user_index"))
    return Limited(rows=len(histories.items), limits=Limits.of(histories, job.has_time))


def write_dataset_report(job: Job, manifest: DatasetManifest, measured: Measurements) -> None:
    """Write the report into the dataset's folder; the manifest is written after it."""
    write_report(job.storage, job.uri, DATASET, dataset_numbers(manifest, measured.counts, measured.limits, measured.items))


def train_span(limits: Limits, data: DataConfig) -> TrainSpan | None:
    """Return the span of the training interactions; training data ends at the cut of a time split, otherwise with the last of them."""
    if limits.train_times is None:
        return None
    first, last = limits.train_times
    return TrainSpan(first, last, data.validation_from if data.split == "time" and data.validation_from is not None else last)


def measure_partition(job: Job, task: MeasureTask) -> Measured:
    """Write one partition's user statistics, stage its sums by item, and count for the report."""
    users = _read(job, task.users, USED_COLUMNS)
    if users is None:
        return Measured(rows=0)
    histories = read_histories(last_rows(users, "user_index") if len(task.users) > 1 else users)
    span = train_span(task.limits, job.data)
    train = _read(job, task.train, [*SAMPLE_COLUMNS, *(EXPOSED if task.has_exposures else ())])
    write_table(job.storage, job.staged(_SUMS, 0, task.partition), item_sums(histories, span, _shown(train)))
    statistics = user_statistics(histories, task.num_kinds, span, job.data.session_gap_seconds)
    samples = _flat_samples(train)
    return Measured(
        rows=len(histories.items),
        user_statistics=job.write_shard(f"statistics/users/{task.partition:05d}.parquet", statistics),
        counts=count_partition(histories, samples, staged_withheld(job), task.num_kinds, task.limits, job.data.session_gap_seconds),
    )


def _read(job: Job, shards: Sequence[str], columns: list[str]) -> pa.Table | None:
    tables = [read_table(job.storage, uri, columns) for uri in shards]
    return pa.concat_tables(tables) if tables else None


def _flat_samples(train: pa.Table | None) -> pa.Table:
    """Return the interactions of training samples, one per row: user_index, item, time, event."""
    if train is None:
        nothing: Integers = np.zeros(0, np.int64)
        return pa.table({"user_index": nothing, "item": nothing, "time": nothing, "event": nothing})
    samples = Sequences.from_table(train.select(SAMPLE_COLUMNS)).cast(items=np.int64, events=np.int64)
    users = samples.scalars["user_index"][samples.owners]
    return pa.table({"user_index": users, "item": samples.items, "time": samples.timestamps, "event": samples.events})


def _shown(train: pa.Table | None) -> Shown | None:
    """Return the exposures of training samples with a label of the weakest positive kind, or None if the samples have no exposures."""
    if train is None or EXPOSED[0] not in train.column_names:
        return None
    items, labels, known = (pc.list_flatten(train[name].combine_chunks()).to_numpy() for name in EXPOSED)
    has_label = known & 1 > 0
    return Shown(items[has_label].astype(np.int64), labels[has_label] & 1 > 0)


def join_item_statistics(job: Job, partitions: Iterable[int], num_items: int, span: TrainSpan | None) -> pa.Table:
    """Merge the staged sums of the given partitions into the statistics of all items."""
    totals = ItemTotals(num_items, has_time=span is not None)
    for partition in partitions:
        totals.add(read_table(job.storage, job.staged(_SUMS, 0, partition)))
    return item_statistics(totals, span)
