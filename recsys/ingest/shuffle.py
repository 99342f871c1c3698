"""An external shuffle through the store: tasks write pieces ordered by partition, partitions read them."""

import bisect
import json
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.store import Storage, join

_PIECE_ROWS = 500_000
_ROW_GROUPS = "partitions"
"""Metadata key of a piece: the partition of each of its row groups, ascending."""


def partition_of(ids: pa.ChunkedArray | pa.Array, num_partitions: int) -> pa.Array:
    """Return each id's partition: CRC-32 modulo `num_partitions`, the same on every machine and in every release."""
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    encoded = column.dictionary_encode()
    hashes = [zlib.crc32(text.encode()) % num_partitions for text in encoded.dictionary.to_pylist()]
    return pa.array(hashes, pa.int32()).take(encoded.indices)


def write_pieces(storage: Storage, folder: str, task: int, tables: Iterable[pa.Table], key: str, num_partitions: int) -> int:
    """Write a task's rows as pieces, each with one row group per partition, and return the number of pieces.

    Piece names follow from the task number, so a retried task overwrites its earlier pieces.
    """
    num_pieces = 0
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(each.num_rows for each in waiting) >= _PIECE_ROWS:
            _write_piece(storage, join(folder, f"{task:06d}-{num_pieces:06d}.parquet"), waiting, key, num_partitions)
            num_pieces += 1
            waiting = []
    if any(table.num_rows for table in waiting):
        _write_piece(storage, join(folder, f"{task:06d}-{num_pieces:06d}.parquet"), waiting, key, num_partitions)
        num_pieces += 1
    return num_pieces


def _write_piece(storage: Storage, uri: str, tables: list[pa.Table], key: str, num_partitions: int) -> None:
    table = pa.concat_tables(tables)
    partitions = partition_of(table[key], num_partitions).to_numpy()
    order = np.argsort(partitions, kind="stable")
    bounds = np.searchsorted(partitions[order], np.arange(num_partitions + 1)).tolist()
    table = table.take(pa.array(order))
    filled = [number for number in range(num_partitions) if bounds[number + 1] > bounds[number]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.parquet"
        with pq.ParquetWriter(path, table.schema.with_metadata({_ROW_GROUPS: json.dumps(filled)})) as writer:
            for number in filled:
                num_rows = bounds[number + 1] - bounds[number]
                writer.write_table(table.slice(bounds[number], num_rows), row_group_size=num_rows)
        storage.upload(path, uri)


def read_partition(storage: Storage, folder: str, partition: int, schema: pa.Schema) -> pa.Table:
    """Read one partition from all pieces in a folder, in name order; only its row groups are fetched."""
    tables = [schema.empty_table()]
    for piece in storage.list(folder):
        filesystem, path = storage.locate(piece.uri)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            filled = json.loads(file.schema_arrow.metadata[_ROW_GROUPS.encode()])
            group = bisect.bisect_left(filled, partition)
            if group < len(filled) and filled[group] == partition:
                tables.append(file.read_row_group(group, columns=schema.names, use_threads=False).select(schema.names).cast(schema))
    return pa.concat_tables(tables)


def write_table(storage: Storage, uri: str, table: pa.Table) -> None:
    """Write a whole table as one Parquet object."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        pq.write_table(table, path)
        storage.upload(path, uri)


def read_table(storage: Storage, uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet object."""
    filesystem, path = storage.locate(uri)
    return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None, use_threads=False)
