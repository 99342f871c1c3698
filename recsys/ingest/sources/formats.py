"""Reads input files as streams of Arrow tables with row numbers; the suffix selects the format."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config.data import CsvConfig
from recsys.errors import UserError
from recsys.ingest.sources.known_layouts import path_columns
from recsys.ingest.sources.lines import BATCH_ROWS
from recsys.ingest.sources.sandbox import reading
from recsys.ingest.sources.scalars import plain
from recsys.ingest.sources.text_files import TEXT, read_text, read_text_header
from recsys.store import ObjectInfo, Storage

INPUT_ORDER = "input_order"

FILE_SHIFT = 40
"""`input_order` is the file's number shifted left by this, plus the row in the file."""

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
    """A file, or some consecutive row groups of a large Parquet file. `num_bytes` is the size of the whole file."""

    uri: str
    file_number: int
    row_groups: tuple[int, ...] | None = None
    first_row: int = 0
    num_bytes: int = 0


def plan_parts(storage: Storage, files: Sequence[ObjectInfo]) -> list[FilePart]:
    """Split Parquet files above 256 MiB into parts of about that size; every other file is one part."""
    parts: list[FilePart] = []
    for number, file in enumerate(files):
        if not _is_parquet(file.uri) or file.num_bytes <= _PART_BYTES:
            parts.append(FilePart(file.uri, number, num_bytes=file.num_bytes))
        else:
            parts += _split_parquet(storage, file, number)
    return parts


def group_parts(parts: Sequence[FilePart]) -> list[tuple[FilePart, ...]]:
    """Group consecutive small parts up to about 64 MiB, so that ten thousand small files become a few tasks."""
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
    """Return a file's columns in order with their declared types (Arrow's or RecBole's), then the columns that its path gives.

    A column of structs is replaced by its fields, as `column.field`. JSONL has no header: its columns are the keys of the first
    thousand lines or, with `is_whole`, of all lines.

    Raises:
        UserError: the file is empty, does not match its suffix, or has two columns of the same name.
    """
    with reading(uri):
        header = _file_header(storage, uri, dialect, is_whole)
    return header | {name: TEXT for name in path_columns(uri) if name not in header}


def read_tables(storage: Storage, part: FilePart, columns: Sequence[str], dialect: CsvConfig, has_lists: bool = True) -> Iterator[pa.Table]:
    """Read some columns of a part, batch by batch, with `input_order` (file number << 40 | row in the file) added.

    Parquet keeps its types, except that equivalent ones (large, view, dictionary) become one. Other formats give strings, or lists
    where a JSON value is a list and `has_lists`; the code that casts them can then count bad values. Empty CSV fields are null. A
    column from the path is a string.

    Raises:
        UserError: the file cannot be read, or expands like a compression bomb; one line with the file and the reason.
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
            f"{part.uri}: its {part.num_bytes} bytes expand to {num_bytes >> 20} MiB or more, like a compression bomb; "
            f"at most {_MOST_EXPANSION} times the size of a file is read; if the rows are real, write them to more files"
        )


def _read_raw(storage: Storage, part: FilePart, columns: list[str], dialect: CsvConfig, has_lists: bool) -> Iterator[pa.Table]:
    """Read columns of the file, and add constant columns that only its path gives."""
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
    """Yield the fields, with each struct replaced by its own fields."""
    for field in fields:
        named = field.with_name(prefix + field.name)
        if pa.types.is_struct(field.type) and field.type.num_fields:
            yield from _leaves(field.type, f"{named.name}.")
        else:
            yield named


def _flat(table: pa.Table) -> pa.Table:
    """Replace struct columns by their fields."""
    while any(pa.types.is_struct(field.type) and field.type.num_fields for field in table.schema):
        table = table.flatten()
    return table


def _read_parquet(storage: Storage, part: FilePart, columns: list[str]) -> Iterator[pa.Table]:
    # A small file is fetched at once; a large one through one buffer per column, since its row groups may be large, too.
    with _open_parquet(storage, part.uri, is_fetched_whole=part.num_bytes <= _WHOLE_BYTES) as file:
        _refuse_bomb(part, file.metadata.num_rows * len(columns) * _LEAST_VALUE_BYTES)
        for batch in file.iter_batches(_batch_rows(file.metadata), row_groups=part.row_groups, columns=columns, use_threads=False):
            yield _flat(pa.Table.from_batches([batch]))


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Choose the number of rows of a batch so that it has about 64 MiB at most: a row may hold a megabyte of text."""
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
