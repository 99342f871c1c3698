"""CSV, JSON lines, RecBole's atomic files and MovieLens's `.dat` to Arrow tables of text; which format a file has is `formats.py`."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv

from recsys.data.inputs.layouts import ATOMIC_SUFFIXES, movielens_columns
from recsys.errors import UserError
from recsys.storage import Storage

BATCH_ROWS = 131_072
MAX_LINE_BYTES = 16 << 20
"""The longest line, and so the largest field, of a text file."""

_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_BATCH_BYTES = 64 << 20
_HEADER_BYTES = 1 << 20
_HEADER_LINES = 1000
_HEADER_LINES_BYTES = 8 << 20
_UNIT_SEPARATOR = "\x1f"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text_header(storage: Storage, uri: str) -> dict[str, str]:
    """Tell a file's columns with their RecBole types, as `formats.read_header` does."""
    if movielens_columns(uri):
        return dict.fromkeys(movielens_columns(uri), "")
    if is_jsonl(uri):
        with _open_stream(storage, uri) as stream:
            rows = _json_rows(uri, _first_lines(uri, stream))
            return dict.fromkeys((name for row in rows for name in row), "")
    names = _first_line(storage, uri)
    return dict(_atomic_column(uri, name) for name in names) if _is_atomic(uri) else dict.fromkeys(names, "")


def read_text(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    """Read some columns batch by batch, as strings, or as lists of strings where a JSON value is a list."""
    if is_jsonl(uri):
        yield from _read_jsonl(storage, uri, columns)
    elif movielens_columns(uri):
        yield from _read_movielens(storage, uri, columns)
    else:
        yield from _read_delimited(storage, uri, columns)


def is_jsonl(uri: str) -> bool:
    """Tell whether a file is JSON lines, by its suffix."""
    return uri.lower().endswith((".jsonl", ".jsonl.gz"))


def _read_delimited(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    names = _first_line(storage, uri)
    if _is_atomic(uri):
        full_names = {_atomic_column(uri, name)[0]: name for name in names}
        names = [full_names[column] for column in columns]
        parsing = arrow_csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, escape_char=False)
    else:
        names = columns
        parsing = arrow_csv.ParseOptions(newlines_in_values=True)
    reading = arrow_csv.ReadOptions(use_threads=False, block_size=MAX_LINE_BYTES)
    with _open_stream(storage, uri) as stream, arrow_csv.open_csv(stream, reading, parsing, _as_text(names)) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch]).rename_columns(columns)


def _as_text(names: list[str]) -> arrow_csv.ConvertOptions:
    types = dict.fromkeys(names, pa.string())
    return arrow_csv.ConvertOptions(include_columns=names, column_types=types, strings_can_be_null=True, null_values=[""])


def _read_movielens(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    """Read `::`-separated lines: Arrow knows separators of one byte alone, so each becomes one that no text has."""
    names = list(movielens_columns(uri))
    parsing = arrow_csv.ParseOptions(delimiter=_UNIT_SEPARATOR, quote_char=False, double_quote=False, escape_char=False)
    with _open_stream(storage, uri) as stream:
        for first, lines in _batches(uri, stream):
            for number, line in enumerate(lines, start=first):
                if line.count(b"::") != len(names) - 1:
                    raise UserError(f"{uri}: line {number} has {line.count(b'::') + 1} fields; {'::'.join(names)} has {len(names)}")
            content = _in_utf8(lines).replace(b"::", _UNIT_SEPARATOR.encode())
            reading = arrow_csv.ReadOptions(use_threads=False, column_names=names, block_size=len(content) + 1)
            yield arrow_csv.read_csv(io.BytesIO(content), reading, parsing, _as_text(columns))


def _in_utf8(lines: list[bytes]) -> bytes:
    """Join lines of MovieLens, which are in Latin-1 in the older editions and in UTF-8 in the newer."""
    content = b"".join(lines)
    try:
        content.decode()
    except UnicodeDecodeError:
        return b"".join(_line_in_utf8(line) for line in lines)
    return content


def _line_in_utf8(line: bytes) -> bytes:
    try:
        line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1").encode()
    return line


def _read_jsonl(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    with _open_stream(storage, uri) as stream:
        for first, lines in _batches(uri, stream):
            rows = [[row.get(column) for column in columns] for row in _json_rows(uri, lines, first)]
            yield pa.table([_json_array([row[index] for row in rows]) for index in range(len(columns))], columns)


def _json_array(values: list[Any]) -> pa.Array:
    if not any(isinstance(value, list) for value in values):
        return pa.array([_json_text(value) for value in values], pa.string())
    lists = [value if isinstance(value, list) or value is None else [value] for value in values]
    texts = [None if entries is None else [_json_text(entry) for entry in entries] for entries in lists]
    return pa.array(texts, pa.list_(pa.string()))


def _json_text(value: Any) -> str | None:
    """Write a JSON value as text; lone surrogates, which no file in UTF-8 can hold, become U+FFFD, which is noticed later."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return _LONE_SURROGATE.sub("\ufffd", text)


def _json_rows(uri: str, lines: Iterator[bytes] | list[bytes], first: int = 1) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{uri}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{uri}: line {number} is not a JSON object such as {{"item_id": "7"}}')
        yield row


def _batches(uri: str, stream: io.BufferedReader) -> Iterator[tuple[int, list[bytes]]]:
    """Gather lines up to a batch's rows or bytes, with the number of the first."""
    first, lines, num_bytes = 1, list[bytes](), 0
    for line in _lines(uri, stream):
        lines.append(line)
        num_bytes += len(line)
        if len(lines) == BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield first, lines
            first, lines, num_bytes = first + len(lines), [], 0
    if lines:
        yield first, lines


def _lines(uri: str, stream: io.BufferedReader) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{uri}: line {number} is longer than {MAX_LINE_BYTES} bytes; split it into records of one line each")
        yield line


def _first_lines(uri: str, stream: io.BufferedReader) -> Iterator[bytes]:
    num_bytes = 0
    for line in islice(_lines(uri, stream), _HEADER_LINES):
        yield line
        num_bytes += len(line)
        if num_bytes > _HEADER_LINES_BYTES:
            return


def _first_line(storage: Storage, uri: str) -> list[str]:
    with _open_stream(storage, uri) as stream:
        line = stream.readline(_HEADER_BYTES)
    if len(line) == _HEADER_BYTES:
        raise UserError(f"{uri}: its first line, which must name the columns, is longer than {_HEADER_BYTES} bytes")
    text = line.decode("utf-8-sig").rstrip("\r\n")
    if not text:
        raise UserError(f"{uri}: is empty; its first line must name the columns")
    return text.split("\t") if _is_atomic(uri) else next(csv.reader([text]))


def _atomic_column(uri: str, full_name: str) -> tuple[str, str]:
    name, separator, kind = full_name.rpartition(":")
    if not separator or kind not in _ATOMIC_TYPES:
        raise UserError(f"{uri}: header '{full_name[:80]}' must be name:type with a type of {', '.join(_ATOMIC_TYPES)}")
    return name, kind


@contextmanager
def _open_stream(storage: Storage, uri: str) -> Iterator[io.BufferedReader]:
    filesystem, path = storage.locate(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    with filesystem.open_input_stream(path, compression=compression) as stream:
        yield io.BufferedReader(stream, 1 << 20)


def _is_atomic(uri: str) -> bool:
    return uri.lower().endswith(tuple(ATOMIC_SUFFIXES.values()))
