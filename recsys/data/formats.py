"""Input files to streams of Arrow tables, by suffix, with row numbers; what the columns mean is `importers.py`."""

import csv
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from recsys.errors import UserError
from recsys.storage import ObjectInfo, Storage

ATOMIC_SUFFIXES = {"events": ".inter", "items": ".item", "users": ".user"}
COMMON_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
INPUT_ORDER = "input_order"

_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_FILE_SHIFT = 40
_BATCH_ROWS = 131_072
_CSV_BLOCK_BYTES = 16 << 20
_HEADER_BYTES = 1 << 20
_HEADER_LINES = 1000
_PART_BYTES = 256 << 20


@dataclass(frozen=True)
class FilePart:
    """What one task reads: a file, or some consecutive row groups of a large Parquet file."""

    uri: str
    file_number: int
    row_groups: tuple[int, ...] | None = None
    first_row: int = 0


def plan_parts(storage: Storage, files: Sequence[ObjectInfo]) -> list[FilePart]:
    """Cut the files into parts of at most about 256 MiB where their format allows it, which is Parquet alone."""
    parts: list[FilePart] = []
    for number, file in enumerate(files):
        if not _is_parquet(file.uri) or file.num_bytes <= _PART_BYTES:
            parts.append(FilePart(file.uri, number))
        else:
            parts += _split_parquet(storage, file.uri, number)
    return parts


def read_header(storage: Storage, uri: str) -> dict[str, str]:
    """Tell a file's columns, in order, each with its RecBole type (empty in the other formats).

    JSONL has no header; there it is the keys of the first thousand lines.

    Raises:
        UserError: the file is empty or not what its suffix says.
    """
    with _reading(uri):
        if _is_parquet(uri):
            with _open_parquet(storage, uri) as file:
                return dict.fromkeys(file.schema_arrow.names, "")
        if _is_jsonl(uri):
            keys: dict[str, str] = {}
            with _open_stream(storage, uri) as stream:
                for row in _json_rows(uri, stream, _HEADER_LINES):
                    keys.update(dict.fromkeys(row, ""))
            return keys
        names = _first_line(storage, uri)
        return dict(_atomic_column(uri, name) for name in names) if _is_atomic(uri) else dict.fromkeys(names, "")


def read_tables(storage: Storage, part: FilePart, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read some columns of a part, batch by batch, with `input_order` (file number << 40 | row in the file) added.

    Parquet keeps its types, but that several of one meaning (large, view, dictionary) become one. The other formats
    give strings, or lists of strings where a JSON value is a list: whoever casts them can then count the bad values.
    Empty CSV fields are null.

    Raises:
        UserError: the file cannot be read; one line with the file and the reason.
    """
    next_row = part.first_row
    with _reading(part.uri):
        for table in _read_raw(storage, part, list(columns)):
            first = (part.file_number << _FILE_SHIFT) + next_row
            next_row += table.num_rows
            yield _plain_types(table).append_column(INPUT_ORDER, pa.array(np.arange(first, first + table.num_rows)))


def _read_raw(storage: Storage, part: FilePart, columns: list[str]) -> Iterator[pa.Table]:
    if _is_parquet(part.uri):
        with _open_parquet(storage, part.uri) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=part.row_groups, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch]).select(columns)
    elif _is_jsonl(part.uri):
        with _open_stream(storage, part.uri) as stream:
            yield from _read_jsonl(part.uri, stream, columns)
    else:
        yield from _read_delimited(storage, part.uri, columns)


def _read_delimited(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    names = _first_line(storage, uri)
    if _is_atomic(uri):
        full_names = {_atomic_column(uri, name)[0]: name for name in names}
        names = [full_names[column] for column in columns]
        parsing = arrow_csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, escape_char=False)
    else:
        names = columns
        parsing = arrow_csv.ParseOptions(newlines_in_values=True)
    converting = arrow_csv.ConvertOptions(
        include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    reading = arrow_csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES)
    with _open_stream(storage, uri) as stream, arrow_csv.open_csv(stream, reading, parsing, converting) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch]).rename_columns(columns)


def _read_jsonl(uri: str, stream: io.BufferedIOBase, columns: list[str]) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for row in _json_rows(uri, stream):
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            yield _json_table(rows, columns)
            rows = []
    if rows:
        yield _json_table(rows, columns)


def _json_table(rows: list[dict[str, Any]], columns: list[str]) -> pa.Table:
    return pa.table({column: _json_array([row.get(column) for row in rows]) for column in columns})


def _json_array(values: list[Any]) -> pa.Array:
    if not any(isinstance(value, list) for value in values):
        return pa.array([_json_text(value) for value in values], pa.string())
    lists = [value if isinstance(value, list) or value is None else [value] for value in values]
    texts = [None if entries is None else [_json_text(entry) for entry in entries] for entries in lists]
    return pa.array(texts, pa.list_(pa.string()))


def _json_text(value: Any) -> str | None:
    """Write a JSON value as text; lone surrogates, which no file in UTF-8 can hold, are left out."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "ignore").decode("utf-8")


def _json_rows(uri: str, stream: io.BufferedIOBase, limit: int | None = None) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if limit is not None and number > limit:
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{uri}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{uri}: line {number} is not a JSON object such as {{"item_id": "7"}}')
        yield row


def _first_line(storage: Storage, uri: str) -> list[str]:
    with _open_stream(storage, uri) as stream:
        line = stream.readline(_HEADER_BYTES).decode("utf-8-sig").rstrip("\r\n")
    if not line:
        raise UserError(f"{uri}: is empty; its first line must name the columns")
    return line.split("\t") if _is_atomic(uri) else next(csv.reader([line]))


def _atomic_column(uri: str, full_name: str) -> tuple[str, str]:
    name, separator, kind = full_name.rpartition(":")
    if not separator or kind not in _ATOMIC_TYPES:
        raise UserError(f"{uri}: header '{full_name[:80]}' must be name:type with a type of {', '.join(_ATOMIC_TYPES)}")
    return name, kind


def _split_parquet(storage: Storage, uri: str, number: int) -> Iterator[FilePart]:
    with _reading(uri), _open_parquet(storage, uri) as file:
        metadata = file.metadata
        groups: list[int] = []
        first_row = num_rows = num_bytes = 0
        for index in range(metadata.num_row_groups):
            groups.append(index)
            num_rows += metadata.row_group(index).num_rows
            num_bytes += metadata.row_group(index).total_byte_size
            if num_bytes >= _PART_BYTES or index == metadata.num_row_groups - 1:
                yield FilePart(uri, number, tuple(groups), first_row)
                first_row += num_rows
                groups, num_rows, num_bytes = [], 0, 0


def _open_parquet(storage: Storage, uri: str) -> pq.ParquetFile:
    filesystem, path = storage.locate(uri)
    return pq.ParquetFile(path, filesystem=filesystem)


@contextmanager
def _open_stream(storage: Storage, uri: str) -> Iterator[io.BufferedReader]:
    filesystem, path = storage.locate(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    with filesystem.open_input_stream(path, compression=compression) as stream:
        yield io.BufferedReader(stream, 1 << 20)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Say in one line which file is broken and how, whatever the decoder raised."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{uri}: cannot be read ({reason})") from error


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def _is_jsonl(uri: str) -> bool:
    return uri.lower().endswith((".jsonl", ".jsonl.gz"))


def _is_atomic(uri: str) -> bool:
    return uri.lower().endswith(tuple(ATOMIC_SUFFIXES.values()))


def _plain_types(table: pa.Table) -> pa.Table:
    """Bring the several Arrow types of one meaning (large, view, dictionary, boolean) to one."""
    for index, field in enumerate(table.schema):
        plain = _plain_type(field.type)
        if plain != field.type:
            table = table.set_column(index, field.name, table[field.name].cast(plain))
    return table


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_boolean(kind):
        return pa.string()
    return pa.float64() if pa.types.is_decimal(kind) else kind
