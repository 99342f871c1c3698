"""Reads CSV, JSON lines, RecBole's atomic files and MovieLens's `.dat` as Arrow tables of text."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import accumulate, islice
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv

from recsys.config.data import CsvConfig
from recsys.errors import UserError
from recsys.ingest.sources.delimited import HEADER_BYTES, as_text, read_delimited, read_names
from recsys.ingest.sources.known_layouts import ATOMIC_SUFFIXES, mind_columns, movielens_columns
from recsys.ingest.sources.lines import MAX_LINE_BYTES, batches, open_stream, read_lines
from recsys.ingest.sources.scalars import JsonNumber, json_number, name_key
from recsys.store import Storage

ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
TEXT, JSON_VALUE = "text", "JSON"
"""Declared types of columns in files that declare none."""

WHOLE_JSON = pa.decimal128(38)
"""The type of whole numbers in JSON lists; no other format has it."""

_HEADER_LINES = 1000
_HEADER_LINES_BYTES = 8 << 20
_MOST_FIELDS = 32
"""An object with more keys than this is a map; its keys are not columns."""

_MOST_DEPTH = 4

_UNIT_SEPARATOR = "\x1f"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text_header(storage: Storage, uri: str, dialect: CsvConfig, is_whole: bool) -> dict[str, str]:
    """Return a text file's columns with their declared types, as `formats.read_header` does."""
    if headless := movielens_columns(uri) or mind_columns(uri):
        return dict.fromkeys(headless, TEXT)
    if is_jsonl(uri):
        with open_stream(storage, uri) as stream:
            names: dict[str, str] = {}
            for first, lines in batches(read_lines(uri, stream)) if is_whole else [(1, list(_first_lines(uri, stream)))]:
                names |= dict.fromkeys(_json_names(list(_json_rows(uri, lines, first))), JSON_VALUE)
            return names
    if is_atomic(uri):
        return dict(_atomic_column(uri, name) for name in _atomic_names(storage, uri))
    return dict.fromkeys(read_names(storage, uri, dialect), TEXT)


def read_text(storage: Storage, uri: str, columns: list[str], dialect: CsvConfig, has_lists: bool) -> Iterator[pa.Table]:
    """Read some columns batch by batch, as strings; with `has_lists`, JSON lists become lists of strings or numbers."""
    if is_jsonl(uri):
        yield from _read_jsonl(storage, uri, columns, has_lists)
    elif movielens_columns(uri):
        yield from _read_headless(storage, uri, columns, list(movielens_columns(uri)), b"::")
    elif mind_columns(uri):
        yield from _read_headless(storage, uri, columns, list(mind_columns(uri)), b"\t")
    elif is_atomic(uri):
        yield from _read_atomic(storage, uri, columns)
    else:
        yield from read_delimited(storage, uri, columns, dialect)


def is_jsonl(uri: str) -> bool:
    """Return whether a file is JSON lines, by its suffix."""
    return uri.lower().endswith((".jsonl", ".jsonl.gz"))


def is_atomic(uri: str) -> bool:
    """Return whether a file is a RecBole atomic file, by its suffix."""
    return uri.lower().endswith(tuple(ATOMIC_SUFFIXES.values()))


def _read_atomic(storage: Storage, uri: str, columns: list[str]) -> Iterator[pa.Table]:
    full_names = {_atomic_column(uri, name)[0]: name for name in _atomic_names(storage, uri)}
    parsing = arrow_csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, escape_char=False)
    reading = arrow_csv.ReadOptions(use_threads=False, block_size=MAX_LINE_BYTES)
    converting = as_text([full_names[column] for column in columns])
    with open_stream(storage, uri) as stream, arrow_csv.open_csv(stream, reading, parsing, converting) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch]).rename_columns(columns)


def _read_headless(storage: Storage, uri: str, columns: list[str], names: list[str], separator: bytes) -> Iterator[pa.Table]:
    """Read lines without quotes and header. Arrow accepts only one-byte separators, so `::` becomes a byte that text does not contain."""
    parsing = arrow_csv.ParseOptions(delimiter=_UNIT_SEPARATOR, quote_char=False, double_quote=False, escape_char=False)
    with open_stream(storage, uri) as stream:
        for first, lines in batches(read_lines(uri, stream)):
            for number, line in enumerate(lines, start=first):
                if line.count(separator) != len(names) - 1:
                    expected = separator.decode().replace("\t", " ").join(names)
                    raise UserError(f"{uri}: line {number} has {line.count(separator) + 1} fields; {expected} has {len(names)}")
            content = _in_utf8(lines).replace(separator, _UNIT_SEPARATOR.encode())
            reading = arrow_csv.ReadOptions(use_threads=False, column_names=names, block_size=len(content) + 1)
            yield arrow_csv.read_csv(io.BytesIO(content), reading, parsing, as_text(columns))


def _in_utf8(lines: list[bytes]) -> bytes:
    """Join MovieLens lines as UTF-8; older editions are in Latin-1."""
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


def _read_jsonl(storage: Storage, uri: str, columns: list[str], has_lists: bool) -> Iterator[pa.Table]:
    with open_stream(storage, uri) as stream:
        for first, lines in batches(read_lines(uri, stream)):
            rows = [[_cell(row, column) for column in columns] for row in _json_rows(uri, lines, first)]
            yield pa.table([_json_array([row[index] for row in rows], has_lists) for index in range(len(columns))], columns)


def _constant(name: str) -> str | None:
    """Read NaN as missing; infinities stay words, which are not numbers."""
    return None if name == "NaN" else name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _json_names(rows: list[dict[str, Any]], prefix: str = "") -> list[str]:
    """List the columns of objects: their keys; a key that holds objects with few keys is replaced by those, as `key.inner`."""
    names: list[str] = []
    for key in dict.fromkeys(key for row in rows for key in row):
        inner = [row[key] for row in rows if row.get(key) is not None]
        is_object = all(isinstance(value, dict) for value in inner) and prefix.count(".") < _MOST_DEPTH
        keys = {name for value in inner for name in value} if is_object else set()
        is_struct = 0 < len(keys) <= _MOST_FIELDS and not any("." in name for name in keys)
        names += _json_names(inner, f"{prefix}{key}.") if is_struct else [f"{prefix}{key}"]
    return list(dict.fromkeys(names))


def _cell(row: dict[str, Any], column: str) -> Any:
    """Return a row's value of a column; the name may lead into nested objects."""
    if column in row or "." not in column:
        return row.get(column)
    for key in _paths(column):
        if isinstance(row.get(key), dict):
            return _cell(row[key], column[len(key) + 1 :])
    return None


def _paths(column: str) -> Iterator[str]:
    """Yield the prefixes of a dotted name that may be keys."""
    place = column.find(".")
    while place >= 0:
        yield column[:place]
        place = column.find(".", place + 1)


def _json_array(values: list[Any], has_lists: bool) -> pa.Array:
    if not (has_lists and any(isinstance(value, list) for value in values)):
        return _string_array([_json_text(value) for value in values])
    lists = [_entries(value) if isinstance(value, list) else None if value is None else [value] for value in values]
    entries = [entry for each in lists for entry in each or () if entry is not None]
    if entries and all(isinstance(entry, JsonNumber) or type(entry) is int for entry in entries):
        # Lists of whole numbers are categories, but vectors if other files have floats there.
        is_vector = any(isinstance(entry, JsonNumber) for entry in entries)
        kind, number = (pa.float64(), float) if is_vector else (WHOLE_JSON, Decimal)
        with suppress(pa.ArrowInvalid):  # a number with more digits than the type holds
            return pa.array([each and [None if entry is None else number(entry) for entry in each] for each in lists], pa.list_(kind))
    lengths = [0 if each is None else len(each) for each in lists]
    offsets = pa.array([0, *accumulate(lengths)], pa.int32())
    texts = _string_array([_json_text(entry) for each in lists for entry in each or ()])
    return pa.ListArray.from_arrays(offsets, texts, mask=pa.array([each is None for each in lists]))


def _entries(values: list[Any]) -> list[Any]:
    """Concatenate inner lists, and replace each object by the entry that names it."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list):
            flat += _entries(value)
        elif isinstance(value, dict) and (key := name_key(value)) is not None:
            flat.append(value[key])
        else:
            flat.append(value)
    return flat


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _string_array(texts: list[str | None]) -> pa.Array:
    """Build a string array; lone surrogates become the bytes that other formats have for them."""
    if not any(text and _LONE_SURROGATE.search(text) for text in texts):
        return pa.array(texts, pa.string())
    raw = pa.array([None if text is None else text.encode("utf-8", "surrogatepass") for text in texts], pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0], raw.null_count)


def _json_rows(uri: str, lines: Iterator[bytes] | list[bytes], first: int = 1) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_float=json_number, parse_constant=_constant, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{uri}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f'{uri}: line {number} is not a JSON object such as {{"item_id": "7"}}')
        yield row


def _first_lines(uri: str, stream: io.BufferedReader) -> Iterator[bytes]:
    num_bytes = 0
    for line in islice(read_lines(uri, stream), _HEADER_LINES):
        yield line
        num_bytes += len(line)
        if num_bytes > _HEADER_LINES_BYTES:
            return


def _atomic_names(storage: Storage, uri: str) -> list[str]:
    with open_stream(storage, uri) as stream:
        line = stream.readline(HEADER_BYTES)
    if len(line) == HEADER_BYTES:
        raise UserError(f"{uri}: its first line, the header, is longer than {HEADER_BYTES} bytes")
    return line.decode("utf-8-sig").rstrip("\r\n").split("\t")


def _atomic_column(uri: str, full_name: str) -> tuple[str, str]:
    name, separator, kind = full_name.rpartition(":")
    if not separator or kind not in ATOMIC_TYPES:
        raise UserError(f"{uri}: header '{full_name[:80]}' must be name:type with a type of {', '.join(ATOMIC_TYPES)}")
    return name, kind
