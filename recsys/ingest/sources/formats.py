"""Input files to streams of Arrow tables with row numbers, by suffix."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config.data import CsvConfig
from recsys.errors import UserError
from recsys.ingest.sources.layouts import path_columns
from recsys.ingest.sources.lines import BATCH_ROWS
from recsys.ingest.sources.sandbox import reading
from recsys.ingest.sources.scalars import plain
from recsys.ingest.sources.text_formats import TEXT, read_text, read_text_header
from recsys.store import ObjectInfo, Storage

INPUT_ORDER = "input_order"

FILE_SHIFT = 40
"""`input_order` is the file's number shifted by this, and the row in the file."""

_PART_BYTES = 256 << 20
_GROUP_BYTES = 64 << 20
_BATCH_BYTES = 64 << 20
_FEWEST_BATCH_ROWS = 256
_WHOLE_BYTES = 16 << 20
_STREAM_BYTES = 4 << 20
_MOST_EXPANSION = 200
_LEAST_BOMB_BYTES = 256 << 20
_LEAST_VALUE_BYTES = 8
_MOST_STRING_BYTES = 16 << 20
_MOST_ENTRIES = 1 << 20
_MOST_DEPTH = 64


@dataclass(frozen=True)
class FilePart:
    """What is read at once: a file, or some consecutive row groups of a large Parquet file. `num_bytes` is the whole file's."""

    uri: str
    file_number: int
    row_groups: tuple[int, ...] | None = None
    first_row: int = 0
    num_bytes: int = 0


def plan_parts(storage: Storage, files: Sequence[ObjectInfo]) -> list[FilePart]:
    """Cut the files into parts of at most about 256 MiB where their format allows it, which is Parquet alone."""
    parts: list[FilePart] = []
    for number, file in enumerate(files):
        if not _is_parquet(file.uri) or file.num_bytes <= _PART_BYTES:
            parts.append(FilePart(file.uri, number, num_bytes=file.num_bytes))
        else:
            parts += _split_parquet(storage, file, number)
    return parts


def group_parts(parts: Sequence[FilePart]) -> list[tuple[FilePart, ...]]:
    """Put consecutive small parts together up to about 64 MiB, so that ten thousand small files are a few tasks."""
    groups: list[list[FilePart]] = []
    num_bytes = _GROUP_BYTES
    for part in parts:
        if num_bytes + part.num_bytes > _GROUP_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(part)
        num_bytes += part.num_bytes
    return [tuple(group) for group in groups]


def read_header(storage: Storage, uri: str, dialect: CsvConfig, is_whole: bool = False) -> dict[str, str]:
    """Return a file's columns, in order, each with the type that it declares, Arrow's or RecBole's, then those that its path gives.

    In place of a column of structs stand its fields, as `column.field`. JSONL has no header; there it is the keys of the first
    thousand lines or, with `is_whole`, of all.

    Raises:
        UserError: the file is empty, not what its suffix says, or has two columns of one name.
    """
    with reading(uri):
        header = _file_header(storage, uri, dialect, is_whole)
    return header | {name: TEXT for name in path_columns(uri) if name not in header}


def read_tables(storage: Storage, part: FilePart, columns: Sequence[str], dialect: CsvConfig, has_lists: bool = True) -> Iterator[pa.Table]:
    """Read some columns of a part, batch by batch, with `input_order` (file number << 40 | row in the file) added.

    Parquet keeps its types, but that several of one meaning (large, view, dictionary) become one. The other formats
    give strings, or lists where a JSON value is a list and `has_lists`: whoever casts them can then count the bad values.
    Empty CSV fields are null. A column that the path gives is a string.

    Raises:
        UserError: the file cannot be read, or grows as only a compression bomb does; one line with the file and the reason.
    """
    next_row = part.first_row
    num_bytes = 0
    with reading(part.uri):
        for raw in _read_raw(storage, part, list(columns), dialect, has_lists):
            table = pa.table([plain(column) for column in raw.columns], raw.column_names)
            num_bytes += table.nbytes
            _refuse_bomb(part, num_bytes)
            first = (part.file_number << FILE_SHIFT) + next_row
            next_row += table.num_rows
            yield table.append_column(INPUT_ORDER, pa.array(np.arange(first, first + table.num_rows)))


def _refuse_bomb(part: FilePart, num_bytes: int) -> None:
    if num_bytes > max(_LEAST_BOMB_BYTES, _MOST_EXPANSION * part.num_bytes):
        raise UserError(
            f"{part.uri}: its {part.num_bytes} bytes stand for {num_bytes >> 20} MiB and more, as those of a compression bomb; "
            f"at most {_MOST_EXPANSION} times the size of a file is read; write it anew with its rows in more files if they are real"
        )


def _read_raw(storage: Storage, part: FilePart, columns: list[str], dialect: CsvConfig, has_lists: bool) -> Iterator[pa.Table]:
    """Read columns of the file, and repeat those that its path alone gives."""
    of_path = path_columns(part.uri)
    if of_path:
        header = _file_header(storage, part.uri, dialect)
        of_path = {name: value for name, value in of_path.items() if name in columns and name not in header}
    of_file = [name for name in columns if name not in of_path]
    is_parquet = _is_parquet(part.uri)
    for table in _read_parquet(storage, part, of_file) if is_parquet else read_text(storage, part.uri, of_file, dialect, has_lists):
        given = [pa.repeat(pa.scalar(value, pa.string()), table.num_rows) for value in of_path.values()]
        yield pa.table([*table.select(of_file).columns, *given], [*of_file, *of_path]).select(columns)


def _file_header(storage: Storage, uri: str, dialect: CsvConfig, is_whole: bool = False) -> dict[str, str]:
    if not _is_parquet(uri):
        return read_text_header(storage, uri, dialect, is_whole)
    with _open_parquet(storage, uri) as file:
        fields = list(_leaves(file.schema_arrow))
    header = {field.name: str(field.type) for field in fields}
    if len(header) < len(fields):
        names = [field.name for field in fields]
        repeated = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"{uri}: has two columns named '{repeated[:80]}'; rename one of them")
    return header


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[pa.Field]:
    """Put the fields of structs in the place of these."""
    for field in fields:
        named = field.with_name(prefix + field.name)
        if pa.types.is_struct(field.type) and field.type.num_fields:
            yield from _leaves(field.type, f"{named.name}.")
        else:
            yield named


def _flat(table: pa.Table) -> pa.Table:
    """Put the fields of structs in the place of these."""
    while any(pa.types.is_struct(field.type) and field.type.num_fields for field in table.schema):
        table = table.flatten()
    return table


def _read_parquet(storage: Storage, part: FilePart, columns: list[str]) -> Iterator[pa.Table]:
    # A small file is fetched at once; of a large one, whose row groups may be as large, no more than a buffer per column.
    with _open_parquet(storage, part.uri, is_fetched_whole=part.num_bytes <= _WHOLE_BYTES) as file:
        _refuse_bomb(part, file.metadata.num_rows * len(columns) * _LEAST_VALUE_BYTES)
        for batch in file.iter_batches(_batch_rows(file.metadata), row_groups=part.row_groups, columns=columns, use_threads=False):
            yield _flat(pa.Table.from_batches([batch]))


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Choose the rows of a batch so that it has at most some 64 MiB: a row may hold a megabyte of text."""
    num_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    row_bytes = max(1, num_bytes // max(1, metadata.num_rows))
    return max(_FEWEST_BATCH_ROWS, min(BATCH_ROWS, _BATCH_BYTES // row_bytes))


def _split_parquet(storage: Storage, file: ObjectInfo, number: int) -> Iterator[FilePart]:
    with reading(file.uri), _open_parquet(storage, file.uri) as parquet:
        metadata = parquet.metadata
        groups: list[int] = []
        first_row = num_rows = num_bytes = 0
        for index in range(metadata.num_row_groups):
            groups.append(index)
            num_rows += metadata.row_group(index).num_rows
            num_bytes += metadata.row_group(index).total_byte_size
            if num_bytes >= _PART_BYTES or index == metadata.num_row_groups - 1:
                yield FilePart(file.uri, number, tuple(groups), first_row, file.num_bytes)
                first_row += num_rows
                groups, num_rows, num_bytes = [], 0, 0


def _open_parquet(storage: Storage, uri: str, is_fetched_whole: bool = False) -> pq.ParquetFile:
    filesystem, path = storage.locate(uri)
    return pq.ParquetFile(
        path,
        filesystem=filesystem,
        pre_buffer=is_fetched_whole,
        buffer_size=0 if is_fetched_whole else _STREAM_BYTES,
        thrift_string_size_limit=_MOST_STRING_BYTES,
        thrift_container_size_limit=_MOST_ENTRIES,
        schema_depth_limit=_MOST_DEPTH,
    )


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")
