"""The identity of an input: its files, the address of its dataset, and the number of partitions."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from recsys.config.data import AUTO, DataConfig
from recsys.data.manifest import FORMAT_VERSION
from recsys.errors import UserError
from recsys.ingest.clean.pseudonyms import PSEUDONYM_KEY, key_identity
from recsys.ingest.clean.times import guess_unit
from recsys.ingest.sources.column_mapping import import_events
from recsys.ingest.sources.formats import FilePart
from recsys.ingest.sources.input_files import event_columns, find_files, find_in_folder
from recsys.ingest.sources.sandbox import reading, run_limited
from recsys.ingest.synthetic.events import GENERATOR_VERSION
from recsys.schema import CONTEXT_PREFIX, LABEL_PREFIX, OPTIONAL_TYPES, POSITION, SLICE_PREFIX, TIMESTAMP
from recsys.store import ObjectInfo, Storage

ROLES = ("events", "items", "users")
_NOT_CONTENT = {"dataset", "base", "folder", *ROLES, "max_file_memory_bytes"}
_PARTITION_EVENTS = 350_000
_FEWEST_PARTITIONS = 4
_MOST_PARTITIONS = 65_536
_SAMPLED_FILES = 8
_EVENT_BYTES = {".csv.gz": 9, ".jsonl.gz": 14, ".jsonl": 100}
_DELIMITED_EVENT_BYTES = 32


@dataclass(frozen=True)
class Inputs:
    """The files of each table; the column that orders events (`timestamp` or `position`), the unit of its numbers, and optional columns."""

    events: list[ObjectInfo]
    items: list[ObjectInfo]
    users: list[ObjectInfo]
    time_column: str
    time_unit: str
    optional: tuple[str, ...] = ()


def find_inputs(data: DataConfig, storage: Storage) -> Inputs:
    """Find the files that the config names.

    Raises:
        UserError: a table or a required column is missing.
    """
    files = _find_tables(data, storage)
    first = files["events"][0].uri
    columns = event_columns(storage, first, data)
    time_column = next(name for name in columns if name in (TIMESTAMP, POSITION))
    if data.split == "time" and time_column != TIMESTAMP:
        raise UserError(f"data.split = 'time': {first} has no column '{data.columns.timestamp}'; 'leave_one_out' would work")
    unit = _find_unit(data, storage, files["events"], time_column)
    found = dict(columns)
    for file in files["events"][1 :: max(1, len(files["events"]) // _SAMPLED_FILES)]:
        with suppress(UserError):  # the task that reads the file reports what is wrong with it
            found |= event_columns(storage, file.uri, data)
    optional = tuple(name for name in found if name in OPTIONAL_TYPES or name.startswith((LABEL_PREFIX, SLICE_PREFIX, CONTEXT_PREFIX)))
    return Inputs(**files, time_column=time_column, time_unit=unit, optional=optional)


def _find_unit(data: DataConfig, storage: Storage, events: list[ObjectInfo], time_column: str) -> str:
    """Return the unit of numeric times: the configured one, or the one inferred from the first number; empty if there is none."""
    if time_column != TIMESTAMP:
        return ""
    if data.time_unit != AUTO:
        return data.time_unit
    units = (run_limited(data.max_file_memory_bytes, first_unit, storage, file, data) for file in events[:_SAMPLED_FILES])
    return next(filter(None, units), "")


def first_unit(storage: Storage, file: ObjectInfo, data: DataConfig) -> str:
    """Infer the time unit from the first batch of a file; empty if it has no positive number."""
    with reading(file.uri):
        first = next(iter(import_events(storage, FilePart(file.uri, 0, num_bytes=file.num_bytes), data, TIMESTAMP)), None)
        return "" if first is None else guess_unit(first[TIMESTAMP])


def _find_tables(data: DataConfig, storage: Storage) -> dict[str, list[ObjectInfo]]:
    if not data.events and not data.folder:
        raise UserError("data.events: is empty; give a file or folder of events, data.folder, or data.source = 'synthetic'")
    uris = {role: getattr(data, role) for role in ROLES}
    return {role: find_files(storage, role, uri) if uri else find_in_folder(storage, role, data.folder) for role, uri in uris.items()}


def identify_inputs(data: DataConfig, storage: Storage) -> list[dict[str, Any]]:
    """Describe the input before any work: its files, or the generator's config, and the identity of the pseudonym key.

    Raises:
        UserError: a table is missing, or the configured key is.
    """
    identity = key_identity(data.pseudonym_key_env)
    keys = [{"role": PSEUDONYM_KEY, "identity": identity}] if identity else []
    if data.source == "synthetic":
        return [{"role": "synthetic", "version": GENERATOR_VERSION, **data.synthetic.model_dump(mode="json")}, *keys]
    files = [(role, file) for role, found in _find_tables(data, storage).items() for file in found]
    return [*({"role": role, "uri": file.uri, "num_bytes": file.num_bytes, "etag": file.etag} for role, file in files), *keys]


def content_config(data: DataConfig) -> dict[str, Any]:
    """Return the config keys that decide what a dataset contains, without the input's location and the memory limit for reading."""
    return data.model_dump(mode="json", exclude=_NOT_CONTENT | (set() if data.source == "synthetic" else {"synthetic"}))


def dataset_uri(data: DataConfig, storage: Storage, base_fingerprint: str = "") -> str:
    """Derive a dataset's address from its input, its config, the format version and, for an appended version, the base's fingerprint."""
    identity = [FORMAT_VERSION, identify_inputs(data, storage), content_config(data)]
    identity += [base_fingerprint] if base_fingerprint else []
    return storage.uri("datasets", hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12])


def choose_num_shards(storage: Storage, events: Sequence[ObjectInfo], data: DataConfig) -> int:
    """Choose the number of partitions from the files alone, so that the events of one partition fit in memory.

    Parquet rows are counted in the footers of a sample of files; rows of other formats are estimated from file sizes.
    """
    tables = [file for file in events if file.uri.lower().endswith(".parquet")]
    others = [file for file in events if not file.uri.lower().endswith(".parquet")]
    num_events = sum(file.num_bytes / _event_bytes(file.uri) for file in others)
    if tables:
        sample = tables[:: -(-len(tables) // _SAMPLED_FILES)]
        num_rows = run_limited(data.max_file_memory_bytes, _count_rows, storage, [file.uri for file in sample])
        num_events += num_rows / sum(file.num_bytes for file in sample) * sum(file.num_bytes for file in tables)
    return min(max(_FEWEST_PARTITIONS, -(-int(num_events) // _PARTITION_EVENTS)), _MOST_PARTITIONS)


def _event_bytes(uri: str) -> int:
    return next((size for suffix, size in _EVENT_BYTES.items() if uri.lower().endswith(suffix)), _DELIMITED_EVENT_BYTES)


def _count_rows(storage: Storage, uris: list[str]) -> int:
    num_rows = 0
    for uri in uris:
        filesystem, path = storage.locate(uri)
        try:
            num_rows += pq.read_metadata(path, filesystem=filesystem).num_rows
        except (OSError, ValueError):
            continue  # the task that reads the file reports what is wrong with it
    return num_rows
