"""An external shuffle through the store: tasks write pieces ordered by partition, partitions read them back; no Ray here."""

import itertools
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.storage import Storage, join

PARTITION = "partition"
_PIECE_ROWS = 1_000_000


def partition_of(ids: pa.ChunkedArray | pa.Array, num_partitions: int) -> pa.Array:
    """Tell each id's partition: CRC-32 modulo their number, the same on every machine and in every release."""
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    encoded = column.dictionary_encode()
    hashes = [zlib.crc32(text.encode()) % num_partitions for text in encoded.dictionary.to_pylist()]
    return pa.array(hashes, pa.int32()).take(encoded.indices)


def write_pieces(storage: Storage, folder: str, task: int, tables: Iterable[pa.Table], key: str, num_partitions: int) -> list[str]:
    """Write a task's rows as pieces, one row group per partition in each, and return the pieces' addresses.

    The names follow from the task's number, so that a retried task overwrites what it wrote before.
    """
    pieces: list[str] = []
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(each.num_rows for each in waiting) >= _PIECE_ROWS:
            pieces.append(_write_piece(storage, join(folder, f"{task:06d}-{len(pieces):04d}.parquet"), waiting, key, num_partitions))
            waiting = []
    if any(table.num_rows for table in waiting):
        pieces.append(_write_piece(storage, join(folder, f"{task:06d}-{len(pieces):04d}.parquet"), waiting, key, num_partitions))
    return pieces


def _write_piece(storage: Storage, uri: str, tables: list[pa.Table], key: str, num_partitions: int) -> str:
    table = pa.concat_tables(tables)
    partitions = partition_of(table[key], num_partitions).to_numpy()
    order = np.argsort(partitions, kind="stable")
    bounds = np.searchsorted(partitions[order], np.arange(num_partitions + 1))
    table = table.append_column(PARTITION, pa.array(partitions)).take(pa.array(order))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.parquet"
        with pq.ParquetWriter(path, table.schema) as writer:
            for start, stop in itertools.pairwise(bounds.tolist()):
                if stop > start:
                    writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        storage.upload(path, uri)
    return uri


def read_partition(storage: Storage, pieces: Sequence[str], partition: int, schema: pa.Schema) -> pa.Table:
    """Read one partition of all pieces, in the order of the pieces; only its row groups are fetched."""
    tables = [schema.empty_table()]
    for uri in pieces:
        filesystem, path = storage.locate(uri)
        rows = pq.read_table(
            path, filesystem=filesystem, columns=schema.names, filters=[(PARTITION, "=", partition)], partitioning=None, use_threads=False
        )
        tables.append(rows.cast(schema))
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
