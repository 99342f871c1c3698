"""The manifest of a dataset, and reading its tables."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.arrays import Mask
from recsys.config import Config
from recsys.config.verb_settings import refuse_contradictions
from recsys.data.features.contexts import ContextSpace
from recsys.data.features.profiles import ProfileSpace
from recsys.errors import UserError
from recsys.schema import Kind, RowParts, Task
from recsys.store import Storage, join

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Final = 5
"""Increased whenever the same input and config would give another dataset."""

USER_INDEX = "user_index"
READ_ROWS = 4096


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Parquet file; `path` is relative to the folder of its dataset.

    `dataset` is the sibling folder of the version that wrote the file, empty for this version. `etag` is the store's ETag when it was
    written.
    """

    path: str
    row_groups: tuple[int, ...]
    num_bytes: int
    sha256: str
    etag: str = ""
    dataset: str = ""

    @property
    def num_rows(self) -> int:
        """Number of rows in all row groups."""
        return sum(self.row_groups)


class ColumnUse(_Record):
    """A column of an input table. `use` is its role: an id, a part of the event, an attribute or a kind of feature; empty: not used.

    `type` is the type that the file declares. `reason` says why the column is not used, or is another remark.
    """

    table: str
    name: str
    type: str
    use: str
    reason: str = ""


class Example(_Record):
    """A rejected row: its file, its row number from 1 (without the header), and the value that broke the rule."""

    file: str
    row: int
    value: str


class DatasetManifest(_Record):
    """Everything that a reader needs to know about a dataset without opening a shard.

    A version above 1 was appended to `base`, a sibling folder. Its shard lists begin with the shards of older versions, and its totals
    include them; `inputs`, `rejected` and `noticed` describe only the appended data. In users, catalogue and statistics the last row of an
    index counts.
    """

    format_version: Literal[5] = FORMAT_VERSION
    fingerprint: str
    version: int = 1
    base: str = ""
    inputs: tuple[dict[str, Any], ...]
    data_config: dict[str, Any]
    tie_rule: str
    num_users: int
    num_items: int
    num_interactions: int
    num_targets: int
    num_queries: int = 0
    rejected: dict[str, int]  # rows dropped, by rule
    noticed: dict[str, int] = {}  # unusual data that was kept, by rule
    rejected_examples: dict[str, tuple[Example, ...]] = {}  # up to three per rule
    columns: tuple[ColumnUse, ...] = ()
    warnings: tuple[str, ...] = ()
    time_unit: str = ""  # unit that numeric times were read in
    items_without_catalogue_entry: int = 0
    event_kinds: tuple[str, ...]
    kinds: tuple[Kind, ...] = ()  # roles of the event kinds, in their order; empty: all are positive
    tasks: tuple[Task, ...]
    exposure_tasks: tuple[str, ...] = ()  # the tasks that exposures have labels of, in the order of their bits
    only_exposures_have_labels: bool = False  # of those tasks; otherwise targets have them, too
    num_exposures: int = 0  # in the training data
    value_mean: float  # of the values; without values, of what the history says was taken (1) or not (0)
    value_std: float
    has_time: bool
    num_streams: int
    category_vocabulary: tuple[str, ...]
    number_columns: tuple[str, ...]
    number_moments: tuple[tuple[float, float], ...] = ()  # (mean, standard deviation) of each column before it was standardized
    vector_size: int
    train_shards: tuple[Shard, ...]
    users_shards: tuple[Shard, ...]
    catalogue_shards: tuple[Shard, ...]
    count_shards: tuple[Shard, ...] = ()  # counts that later versions add to the catalogue's `train_count`
    user_statistics_shards: tuple[Shard, ...] = ()
    item_statistics_shards: tuple[Shard, ...] = ()
    query_shards: tuple[Shard, ...] = ()  # typed queries, in the order of their indices
    listed_shards: tuple[Shard, ...] = ()  # users of the users table that no event of this or an older version is of
    profiles: ProfileSpace = ProfileSpace()
    contexts: ContextSpace = ContextSpace()

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Parse the manifest stored at `where`.

        Raises:
            UserError: the text is not a manifest, or has another format.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{where}: is not a manifest of format {FORMAT_VERSION} ({field}: {first['msg']}); run python -m jobs.prepare_data again"
            ) from None

    @property
    def has_exposures(self) -> bool:
        """Whether users and samples have exposures."""
        return bool(self.exposure_tasks)

    @property
    def row_parts(self) -> RowParts:
        """What the rows of users and samples have beyond the interactions."""
        return RowParts(self.has_exposures, bool(self.contexts), bool(self.profiles))

    @property
    def kind_table(self) -> tuple[Kind, ...]:
        """The event kinds with their roles, weak to strong."""
        return self.kinds or tuple(Kind(name) for name in self.event_kinds)

    @property
    def target_kinds(self) -> Mask:
        """Which event kinds are targets (kinds,)."""
        return np.array([kind.is_target for kind in self.kind_table])

    @property
    def default_kind(self) -> int:
        """The number of the weakest positive kind, which an interaction without a kind has."""
        return next((number for number, kind in enumerate(self.kind_table) if kind.is_target), 0)

    @property
    def has_labels(self) -> bool:
        """Whether the data brings its own labels: a row is then an event of the kinds that it has a label 1 of, or an exposure."""
        return bool(self.data_config.get("columns", {}).get("labels"))

    @property
    def num_samples(self) -> int:
        """Number of training samples, which are the rows of the training shards."""
        return sum(shard.num_rows for shard in self.train_shards)

    @property
    def has_values(self) -> bool:
        """Return whether interactions have values, such as ratings."""
        return any(task.event is None for task in self.tasks)


_NOT_CONTENT = ("fingerprint", "inputs", "base", "rejected_examples", "columns", "warnings", "time_unit")


def content_fingerprint(fields: dict[str, Any]) -> str:
    """Hash a dataset's content: the manifest without its fingerprint, descriptions of the input, and the locations of shards."""

    def without_place(value: Any) -> Any:
        is_shards = isinstance(value, (list, tuple)) and value and isinstance(value[0], dict) and "sha256" in value[0]
        return [{key: shard[key] for key in shard if key not in ("etag", "dataset")} for shard in value] if is_shards else value

    content = {key: without_place(value) for key, value in fields.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A manifest and the folder of its own shards; shards of older versions are in sibling folders."""

    storage: Storage
    uri: str
    manifest: DatasetManifest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.uri, self.manifest)  # without the cached tables

    @classmethod
    def open(cls, storage: Storage, uri: str, key: str = "data.dataset") -> "Dataset":
        """Open a dataset by its manifest; `key` is the config key of its address.

        Raises:
            UserError: there is no dataset at `uri`, or it has another format.
        """
        if not uri:
            raise UserError(f"{key}: is empty; give the 'dataset' that python -m jobs.prepare_data printed")
        if not storage.exists(join(uri, MANIFEST_NAME)):
            raise UserError(f"{key} = {uri}: has no {MANIFEST_NAME}; give the 'dataset' that python -m jobs.prepare_data printed")
        manifest = DatasetManifest.parse(storage.read_bytes(join(uri, MANIFEST_NAME)), join(uri, MANIFEST_NAME))
        return cls(storage, uri.rstrip("/"), manifest)

    @property
    def name(self) -> str:
        """The last part of the address; later versions refer to this version by it."""
        return self.uri.rpartition("/")[2]

    def complete(self, config: Config) -> Config:
        """Return the config completed with the data section that this dataset was made with; a given shorter `data.max_history` is kept.

        Raises:
            UserError: another given key of that section has another value.
        """
        made_by = dict(self.manifest.data_config)
        longest = made_by.get("max_history", config.data.max_history)
        if "data.max_history" in config.given and config.data.max_history < longest:
            stride = min(made_by.get("window_stride") or longest, config.data.max_history)
            made_by |= {"max_history": config.data.max_history, "window_stride": stride}
        refuse_contradictions(config, {"data": made_by}, f"the dataset {self.uri}", "prepare the data with it")
        return config.with_values({f"data.{key}": value for key, value in made_by.items()} | {"data.dataset": self.uri})

    def address(self, shard: Shard) -> str:
        """Return the address of a shard of this or an older version."""
        return join(self.sibling(shard.dataset) if shard.dataset else self.uri, shard.path)

    def sibling(self, name: str) -> str:
        """Return the address of another version of the dataset."""
        return join(self.uri.rpartition("/")[0], name)

    @cached_property
    def catalogue(self) -> pa.Table:
        """The items, sorted by `item_index` (CATALOGUE_SCHEMA), with `train_count` over all versions."""
        rows = self.catalogue_rows
        if not self.manifest.count_shards:
            return rows
        counts = rows["train_count"].to_numpy().copy()
        for added in map(self.read_shard, self.manifest.count_shards):
            np.add.at(counts, added["item_index"].to_numpy() - 1, added["count"].to_numpy())
        return rows.set_column(rows.column_names.index("train_count"), "train_count", pa.array(counts, pa.int64()))

    @cached_property
    def catalogue_rows(self) -> pa.Table:
        """The newest row of each item, sorted by `item_index`; `train_count` lacks the counts that later versions add."""
        rows = pa.concat_tables([self.read_shard(shard) for shard in self.manifest.catalogue_shards])
        return (rows if self.manifest.version == 1 else last_rows(rows, "item_index")).combine_chunks()

    def read_users(self, columns: list[str] | None = None) -> pa.Table:
        """Read all users, sorted by `user_index` (USERS_SCHEMA), with the newest row of each user."""
        with_index = columns and list(dict.fromkeys([*columns, USER_INDEX]))
        users = pa.concat_tables([self.read_shard(shard, with_index) for shard in self.manifest.users_shards])
        users = users if self.manifest.version == 1 else last_rows(users, USER_INDEX)
        return users.select(columns or users.column_names).combine_chunks()

    def user_batches(self, columns: list[str]) -> Iterator[pa.Table]:
        """Read all users as tables of at most `READ_ROWS` rows, shard by shard if no later version replaces users."""
        by_shard = self.manifest.version == 1
        tables = (self.read_shard(shard, columns) for shard in self.manifest.users_shards) if by_shard else (self.read_users(columns),)
        return (pa.Table.from_batches([rows]) for table in tables for rows in table.to_batches(READ_ROWS))

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """Read all columns of a shard, or some of them."""
        filesystem, path = self.storage.locate(self.address(shard))
        return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None)


def last_rows(table: pa.Table, index: str) -> pa.Table:
    """Return the last row for each value of the column `index`, sorted by it."""
    values, last = np.unique(table[index].to_numpy()[::-1], return_index=True)
    return table.take(pa.array(table.num_rows - 1 - last)) if len(values) else table
