"""The manifest of a dataset, and reading its tables."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.config import Config
from recsys.config.verb_settings import refuse_contradictions
from recsys.errors import UserError
from recsys.schema import Task
from recsys.store import Storage, join

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Final = 5
"""Goes up whenever the same input and config would give another dataset."""

USER_INDEX = "user_index"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Parquet file; `path` is relative to the folder of its dataset.

    `dataset` names the sibling folder of the version that wrote it, empty for this one. `etag` is the store's own mark of the content
    when it was written.
    """

    path: str
    row_groups: tuple[int, ...]
    num_bytes: int
    sha256: str
    etag: str = ""
    dataset: str = ""

    @property
    def num_rows(self) -> int:
        """Rows over all row groups."""
        return sum(self.row_groups)


class ColumnUse(_Record):
    """A column of an input table and what it is used as: an id, an event's part, an attribute or a feature's kind; empty: it is not used.

    `type` is what the file declares, `reason` why it is not used, or what else there is to say of it.
    """

    table: str
    name: str
    type: str
    use: str
    reason: str = ""


class Example(_Record):
    """A refused row: its file, its number in it from 1 (a header is no row), and the value that the rule is about."""

    file: str
    row: int
    value: str


class DatasetManifest(_Record):
    """Everything that a reader needs to know of a dataset without opening a shard.

    A version above 1 was appended to `base`, a sibling folder: its lists of shards begin with the older versions' shards, its totals
    count them all, `inputs`, `rejected` and `noticed` are of what was appended. Of users, catalogue and statistics the last row of an
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
    noticed: dict[str, int] = {}  # what was kept but is odd
    rejected_examples: dict[str, tuple[Example, ...]] = {}  # up to three of each rule
    columns: tuple[ColumnUse, ...] = ()
    warnings: tuple[str, ...] = ()
    time_unit: str = ""  # what times that are numbers were read as
    items_without_catalogue_entry: int = 0
    event_kinds: tuple[str, ...]
    tasks: tuple[Task, ...]
    value_mean: float
    value_std: float
    has_time: bool
    num_streams: int
    category_vocabulary: tuple[str, ...]
    number_columns: tuple[str, ...]
    number_moments: tuple[tuple[float, float], ...] = ()  # mean and standard deviation of each before it was standardised
    vector_size: int
    train_shards: tuple[Shard, ...]
    users_shards: tuple[Shard, ...]
    catalogue_shards: tuple[Shard, ...]
    count_shards: tuple[Shard, ...] = ()  # what later versions add to the catalogue's `train_count`
    user_statistics_shards: tuple[Shard, ...] = ()
    item_statistics_shards: tuple[Shard, ...] = ()
    query_shards: tuple[Shard, ...] = ()  # what users typed, in the order of its indices

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Read a manifest that lies at `where`.

        Raises:
            UserError: it is none, or of another format.
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
    def num_samples(self) -> int:
        """Training samples, which are the rows of the training shards."""
        return sum(shard.num_rows for shard in self.train_shards)

    @property
    def has_values(self) -> bool:
        """Return whether interactions have values, such as ratings."""
        return any(task.event is None for task in self.tasks)


_NOT_CONTENT = ("fingerprint", "inputs", "base", "rejected_examples", "columns", "warnings", "time_unit")


def content_fingerprint(fields: dict[str, Any]) -> str:
    """Hash what a dataset contains: the manifest without its fingerprint, descriptions of the input, and the places of shards."""

    def without_place(value: Any) -> Any:
        is_shards = isinstance(value, (list, tuple)) and value and isinstance(value[0], dict) and "sha256" in value[0]
        return [{key: shard[key] for key in shard if key not in ("etag", "dataset")} for shard in value] if is_shards else value

    content = {key: without_place(value) for key, value in fields.items() if key not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A manifest together with the folder that its own shards are in; those of older versions are in sibling folders."""

    storage: Storage
    uri: str
    manifest: DatasetManifest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.uri, self.manifest)  # tables that were read stay behind

    @classmethod
    def open(cls, storage: Storage, uri: str, key: str = "data.dataset") -> "Dataset":
        """Read a dataset's manifest; `key` is the config's for its address.

        Raises:
            UserError: there is no dataset at `uri`, or it is of another format.
        """
        if not uri:
            raise UserError(f"{key}: is empty; give the 'dataset' that python -m jobs.prepare_data printed")
        if not storage.exists(join(uri, MANIFEST_NAME)):
            raise UserError(f"{key} = {uri}: has no {MANIFEST_NAME}; give the 'dataset' that python -m jobs.prepare_data printed")
        manifest = DatasetManifest.parse(storage.read_bytes(join(uri, MANIFEST_NAME)), join(uri, MANIFEST_NAME))
        return cls(storage, uri.rstrip("/"), manifest)

    @property
    def name(self) -> str:
        """The last part of the address, which later versions know this one by."""
        return self.uri.rpartition("/")[2]

    def adopt(self, config: Config) -> Config:
        """Return the config with the data section that this dataset was made by; a shorter `data.max_history` that was given is kept.

        Raises:
            UserError: another key of that section was given and says otherwise.
        """
        made_by = dict(self.manifest.data_config)
        longest = made_by.get("max_history", config.data.max_history)
        if "data.max_history" in config.given and config.data.max_history < longest:
            stride = min(made_by.get("window_stride") or longest, config.data.max_history)
            made_by |= {"max_history": config.data.max_history, "window_stride": stride}
        refuse_contradictions(config, {"data": made_by}, f"the dataset {self.uri}", "prepare the data with it")
        return config.with_values({f"data.{key}": value for key, value in made_by.items()} | {"data.dataset": self.uri})

    def address(self, shard: Shard) -> str:
        """Return the address of a shard, whichever version wrote it."""
        return join(self.sibling(shard.dataset) if shard.dataset else self.uri, shard.path)

    def sibling(self, name: str) -> str:
        """Return the address of another version of the dataset."""
        return join(self.uri.rpartition("/")[0], name)

    @cached_property
    def catalogue(self) -> pa.Table:
        """The items, sorted by `item_index` (CATALOGUE_SCHEMA), with the training interactions of all versions counted."""
        rows = self.catalogue_rows
        counts = rows["train_count"].to_numpy().copy()
        for added in map(self.read_shard, self.manifest.count_shards):
            np.add.at(counts, added["item_index"].to_numpy() - 1, added["count"].to_numpy())
        return rows.set_column(rows.column_names.index("train_count"), "train_count", pa.array(counts, pa.int64()))

    @cached_property
    def catalogue_rows(self) -> pa.Table:
        """The items as the last shard with a row of each has them, sorted by `item_index`; `train_count` is the first version's."""
        rows = pa.concat_tables([self.read_shard(shard) for shard in self.manifest.catalogue_shards])
        return (rows if self.manifest.version == 1 else last_rows(rows, "item_index")).combine_chunks()

    def read_users(self, columns: list[str] | None = None) -> pa.Table:
        """Read all users, sorted by `user_index` (USERS_SCHEMA), each as the newest version with a row of that user has it."""
        with_index = columns and list(dict.fromkeys([*columns, USER_INDEX]))
        users = pa.concat_tables([self.read_shard(shard, with_index) for shard in self.manifest.users_shards])
        users = users if self.manifest.version == 1 else last_rows(users, USER_INDEX)
        return users.select(columns or users.column_names).combine_chunks()

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """Read one shard whole, or some of its columns."""
        filesystem, path = self.storage.locate(self.address(shard))
        return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None)


def last_rows(table: pa.Table, index: str) -> pa.Table:
    """Keep the last row of each value of the column `index`, sorted by it."""
    values, last = np.unique(table[index].to_numpy()[::-1], return_index=True)
    return table.take(pa.array(table.num_rows - 1 - last)) if len(values) else table
