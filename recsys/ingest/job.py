"""The job of one preparation: what its tasks share, where they write, and the outcomes that they report."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys.config.data import DataConfig
from recsys.data.manifest import ColumnUse, Dataset, Shard
from recsys.ingest.clean.id_overlap import Overlap
from recsys.ingest.clean.rejects import Found
from recsys.ingest.ray_tasks import Outcome, Record, Reported, run_tasks
from recsys.ingest.write.report_counts import Counts, Limits
from recsys.schema import TIMESTAMP, events_schema
from recsys.store import Storage, join, sha256_of

_TABLE_SHARD_ROWS = 1_000_000


@dataclass(frozen=True)
class Job:
    """Settings that all tasks of one preparation share; `base` is the version that it appends to, if any."""

    storage: Storage
    uri: str
    data: DataConfig
    time_column: str
    time_unit: str = "s"
    base: Dataset | None = None
    optional: tuple[str, ...] = ()  # the optional columns that the events have

    @property
    def events_schema(self) -> pa.Schema:
        """The schema of staged events."""
        return events_schema(self.optional)

    @property
    def has_time(self) -> bool:
        """Whether events are ordered by time; otherwise by position."""
        return self.time_column == TIMESTAMP

    @property
    def num_partitions(self) -> int:
        """Number of partitions that users are hashed into; chosen before the first task."""
        assert self.data.num_shards is not None
        return self.data.num_shards

    def staging(self, *parts: str) -> str:
        """Return an address in the staging folder, which is deleted when the dataset is finished."""
        return join(self.uri, "staging", *parts)

    def staged(self, table: str, generation: int, partition: int) -> str:
        """Return the address of one partition of a staged table; each k-core round is a generation."""
        return self.staging(f"{table}-{generation:04d}", f"{partition:05d}.parquet")

    def run(self, label: str, kind: type[Reported], function: Callable[[Any], Reported], tasks: Sequence[Any]) -> list[Reported]:
        """Run one pass; tasks that an earlier run of the same job finished are not repeated."""
        return run_tasks(label, function, tasks, Record(self.storage, self.staging("outcomes", label.replace(" ", "-")), kind))

    def write_shard(self, path: str, table: pa.Table) -> Shard | None:
        """Write a table as a shard; return None if it has no rows."""
        if table.num_rows == 0:
            return None
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.parquet"
            pq.write_table(table, local, row_group_size=self.data.row_group_rows, write_page_checksum=True)
            metadata = pq.read_metadata(local)
            row_groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
            num_bytes, sha256 = local.stat().st_size, sha256_of(local)
            self.storage.upload(local, join(self.uri, path))
        stored = self.storage.stat(join(self.uri, path))
        return Shard(path=path, row_groups=row_groups, num_bytes=num_bytes, sha256=sha256, etag=stored.etag if stored else "")

    def write_shards(self, folder: str, table: pa.Table) -> list[Shard]:
        """Write an in-memory table as shards of at most a million rows."""
        pieces = (table.slice(first, _TABLE_SHARD_ROWS) for first in range(0, table.num_rows, _TABLE_SHARD_ROWS))
        return present(self.write_shard(f"{folder}/{number:05d}.parquet", piece) for number, piece in enumerate(pieces))


def present(shards: Iterable[Shard | None]) -> list[Shard]:
    """Return the shards without the Nones of empty tables."""
    return [shard for shard in shards if shard is not None]


class Cleaned(Outcome):
    """Rows that a task dropped (by rule, with examples), odd rows that it kept, and the use of each column."""

    rejected: dict[str, int]
    examples: dict[str, list[Found]]
    noticed: Counter[str] = Field(default_factory=Counter)
    uses: tuple[ColumnUse, ...] = ()


class Partition(Cleaned):
    """One partition of the cleaned events; in an appended version `num_users` and `num_queries` count only new ones."""

    num_users: int
    num_queries: int
    event_kinds: tuple[str, ...]
    contexts: dict[str, tuple[str, ...]]  # the values of each column of contexts


class UserColumns(Outcome):
    """The number of users by value, for each column of one partition of the users table."""

    values: dict[str, dict[str, int]]


class Limited(Outcome):
    """The limits of one partition's interactions, which set the range of the report's bins."""

    limits: Limits


class Written(Cleaned, Limited):
    """One partition's shards; `rejected` counts rows of the users table, `withheld` the removed training interactions."""

    users: Shard | None
    train: Shard | None
    queries: Shard | None
    listed: Shard | None
    num_interactions: int
    num_targets: int
    num_exposures: int
    withheld: int
    overlap: Overlap
    value_moments: tuple[int, float, float]


class Measured(Outcome):
    """One partition's statistics, over all versions."""

    user_statistics: Shard | None = None
    counts: Counts = Field(default_factory=dict)
