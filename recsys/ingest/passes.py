"""What preparing and appending share: running passes, numbering items, publishing."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from recsys.arrays import Integers
from recsys.data.manifest import MANIFEST_NAME, ColumnUse, Dataset, DatasetManifest, content_fingerprint
from recsys.errors import UserError
from recsys.ingest.clean.overlap import Overlap
from recsys.ingest.clean.rejects import Rejects, remedy, tell
from recsys.ingest.clean.times import UNIT_NAMES
from recsys.ingest.identity import Inputs
from recsys.ingest.partitions import IS_WITHHELD, ITEM_INDEX_NAME, Job, stage_events, stage_users, write_shard
from recsys.ingest.ray_tasks import Outcome, Record, run_tasks
from recsys.ingest.shuffle import read_table, write_table
from recsys.ingest.sources import input_files
from recsys.ingest.sources.sandbox import run_limited
from recsys.ingest.write.catalogue import clean_items, sort_ids
from recsys.ingest.write.splits import withheld
from recsys.schema import ITEM_ID, FeatureKind
from recsys.store import ObjectInfo, Storage, join
from recsys.store.backends import TEMP_PREFIX

logger = logging.getLogger(__name__)
_CATALOGUE_SHARD_ROWS = 1_000_000


def run_pass(job: Job, label: str, function: Callable[[Any], Outcome], tasks: Sequence[Any]) -> list[Outcome]:
    """Run one pass; what an earlier run of the same job has finished is not done again."""
    return run_tasks(label, function, tasks, Record(job.storage, job.staging("outcomes", label.replace(" ", "-"))))


def stage_inputs(job: Job, label: str, files: Sequence[ObjectInfo]) -> list[Outcome]:
    """Write the pieces of one table, `events` or `users`."""
    function = stage_events if label == "events" else stage_users
    tasks = list(enumerate(input_files.plan_tasks(job.storage, files, job.data))) if files else []
    # The child with the memory limit reads and writes: what is in the files never enters this process or a worker.
    return run_pass(job, label, lambda task: run_limited(job.data.max_file_memory_bytes, function, job, *task), tasks)


@dataclass(frozen=True)
class CleanItems:
    """The item table, which fits in memory, if there is one: its rows, its features' kinds, what was rejected, and its columns' uses."""

    rows: pa.Table | None
    kinds: dict[str, FeatureKind]
    rejects: Rejects
    uses: tuple[ColumnUse, ...] = ()


def read_items(job: Job, files: list[ObjectInfo]) -> CleanItems:
    """Read the whole item table."""
    if not files:
        return CleanItems(None, {}, Rejects())
    items = input_files.read_items(job.storage, files, job.data)
    rows, rejects = clean_items(items.rows, job.data.cleaning.reject_negative_ids)
    features = ", ".join(f"{name} ({kind})" for name, kind in items.kinds.items())
    logger.info("items: %d rows; features: %s", rows.num_rows, features or "none")
    return CleanItems(rows, items.kinds, rejects, items.uses)


def count_items(job: Job, generation: int) -> pa.Table:
    """Add up how often each item occurs (columns `item_id`, `count_sum`), partition by partition."""
    total = _sum_items([])
    for partition in range(job.num_partitions):
        total = _sum_items([total.rename_columns([ITEM_ID, "count"]), read_table(job.storage, job.staged("items", generation, partition))])
    return total


def _sum_items(tables: list[pa.Table]) -> pa.Table:
    nothing = pa.table({ITEM_ID: pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    return pa.concat_tables([nothing, *tables]).group_by(ITEM_ID, use_threads=False).aggregate([("count", "sum")])


def number_items(job: Job, generation: int, items: pa.Table | None, known: Sequence[str] = ()) -> tuple[pa.Array, Counter[str], list[str]]:
    """Number the items: the `known` first, then those of the catalogue and of events alone in natural order.

    Under k_core only those that events have left are numbered. Tells also what is odd about those that are not known, and warns where
    events and catalogue hardly speak of the same items.
    """
    seen = set(count_items(job, generation)[ITEM_ID].to_pylist())
    listed = set(items[ITEM_ID].to_pylist()) if items is not None else set()
    new = (seen if job.data.k_core else seen | listed).difference(known)
    ids = pa.array([*known, *sort_ids(list(new))], pa.string())
    is_withheld = withheld(ids, job.data)
    write_table(job.storage, job.staging(ITEM_INDEX_NAME), pa.table({ITEM_ID: ids, IS_WITHHELD: is_withheld}))
    num_unknown = len((seen - listed).difference(known)) if items is not None else 0
    noticed = Counter(unknown_item=num_unknown, withheld_item=int(is_withheld[len(known) :].sum()))
    if items is None:
        return ids, noticed, []
    both = Overlap.of(*(pa.array(sort_ids(list(side)), pa.string()) for side in (seen.difference(known), listed)))
    takes_unused = not known and not job.data.k_core
    return ids, noticed, both.warnings("items", "data.columns.item_id", takes_unused)


def train_counts(job: Job, num_items: int) -> Integers:
    """Add up the training interactions of each item that the partitions staged."""
    counts = np.zeros(num_items, np.int64)
    for partition in range(job.num_partitions):
        staged = read_table(job.storage, job.staged("train-counts", 0, partition))
        counts[staged["item_index"].to_numpy() - 1] += staged["count"].to_numpy()
    return counts


def write_shards_of(job: Job, folder: str, table: pa.Table) -> list[Outcome]:
    """Write a table that the driver holds as shards of at most a million rows."""
    shards = []
    for number, first in enumerate(range(0, table.num_rows, _CATALOGUE_SHARD_ROWS)):
        shards.append(write_shard(job, f"{folder}/{number:05d}.parquet", table.slice(first, _CATALOGUE_SHARD_ROWS)))
    return [shard for shard in shards if shard]


def sum_counts(outcomes: Iterable[Outcome], key: str) -> Counter[str]:
    """Add up the counters that outcomes have under a key."""
    return sum((Counter(outcome.get(key, {})) for outcome in outcomes), Counter())


def rejects_of_users(users: Sequence[Outcome], shards: Sequence[Outcome]) -> Rejects:
    """Join what was dropped of the users' table where it was staged and where it was joined."""
    return Rejects.of_outcomes([*users, *(outcome["listed"] for outcome in shards)])


def describe_input(
    job: Job,
    inputs: Inputs,
    items: CleanItems,
    warnings: Sequence[str],
    events: Sequence[Outcome],
    users: Sequence[Outcome],
    shards: Sequence[Outcome],
) -> dict[str, Any]:
    """Say what became of the input, as fields of a manifest: examples of refused rows, each column's use, warnings, the unit of time.

    `events` are the outcomes of all passes over events, `users` those that staged the users' table, `shards` those that joined it.
    """
    examples = Rejects.of_outcomes(events).named(inputs.events) | items.rejects.named(inputs.items)
    examples |= rejects_of_users(users, shards).named(inputs.users)
    overlap = Overlap.join(Overlap(**outcome["listed"]["overlap"]) for outcome in shards)
    uses = [ColumnUse.model_validate(use) for outcome in (*events, *users) for use in outcome.get("uses", ())]
    return {
        "rejected_examples": examples,
        "columns": tuple(dict.fromkeys([*uses, *items.uses])),
        "warnings": (*warnings, *(overlap.warnings("users", "data.columns.user_id", takes_unused=False) if inputs.users else ())),
        "time_unit": inputs.time_unit,
    }


def present(counts: Counter[str]) -> dict[str, int]:
    """Keep what occurred, sorted by name."""
    return {name: count for name, count in sorted(counts.items()) if count}


def sign(**fields: Any) -> DatasetManifest:
    """Build a manifest and its fingerprint."""
    unsigned = DatasetManifest(fingerprint="", **fields)
    return unsigned.model_copy(update={"fingerprint": content_fingerprint(unsigned.model_dump(mode="json"))})


def publish(job: Job, manifest: DatasetManifest) -> Dataset:
    """Write the manifest, once and last, and remove what only the work needed."""
    job.storage.create(join(job.uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    clear_leftovers(job.storage, job.uri)
    tell_outcome(manifest)
    return Dataset.open(job.storage, job.uri)


def clear_leftovers(storage: Storage, uri: str) -> None:
    """Remove what only the work on a published dataset needed, and the halves of files that killed writers left in its folder."""
    storage.delete_tree(join(uri, "staging"))
    filesystem, path = storage.locate(uri)
    for found in filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
        if found.base_name.startswith(TEMP_PREFIX):
            filesystem.delete_file(found.path)


def tell_outcome(manifest: DatasetManifest) -> None:
    """Log what a dataset holds, and of its input all that is not in it or that a person should look at."""
    logger.info(
        "%d users, %d items, %d interactions; rejected: %s; noticed: %s; items without a catalogue entry: %d; %s",
        manifest.num_users,
        manifest.num_items,
        manifest.num_interactions,
        manifest.rejected or "none",
        manifest.noticed or "none",
        manifest.items_without_catalogue_entry,
        manifest.tie_rule,
    )
    if manifest.time_unit:
        logger.info("times: numbers are read as %s (data.time_unit)", UNIT_NAMES[manifest.time_unit])
    for rule, count in manifest.rejected.items():
        logger.info("rejected %s", tell(rule, count, manifest.rejected_examples.get(rule, ())))
    unused = [f"{use.table}.{use.name} ({use.type}: {use.reason})" for use in manifest.columns if not use.use]
    if unused:
        logger.warning("columns that are not used: %s", ", ".join(unused))
    for warning in manifest.warnings:
        logger.warning("%s", warning)


def refuse_empty(job: Job, inputs: Inputs, outcomes: Sequence[Outcome], rejects: Rejects) -> None:
    """Stop where the passes have left no interaction.

    Raises:
        UserError: there is none; the line says why, which rows those are, and what would take them.
    """
    if not any(outcome["rows"] for outcome in outcomes):
        raise nothing_left(job, inputs, "no interaction is left", rejects)


def nothing_left(job: Job, inputs: Inputs, what: str, rejects: Rejects) -> UserError:
    """Say that too little is left of the events, with all that was rejected of them and what would take it."""
    examples = rejects.named(inputs.events)
    found = ". ".join(tell(rule, count, examples.get(rule, ())) for rule, count in sorted(rejects.items()) if count)
    where = job.data.events or job.data.folder
    return UserError(f"data.events = {where}: {what}; rejected {found or 'nothing'}{remedy(rejects)}")
