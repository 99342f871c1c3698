"""Reads CSV in any dialect, detected or given, strictly, so that no value is altered."""

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, product
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv

from recsys.config.data import AUTO, CsvConfig
from recsys.errors import UserError
from recsys.ingest.sources import lines as text_lines
from recsys.ingest.sources.lines import MAX_LINE_BYTES, batches, open_stream, read_blocks, read_lines
from recsys.store import Storage

HEADER_BYTES = 1 << 20
_SAMPLE_RECORDS = 200
_RECORDS_BYTES = 8 << 20
"""Size limit of a batch of records split in Python, where strings take several times their bytes."""

_SINGLE, _DOUBLE = "'", '"'
_BACKSLASH = "\\"
_DETECTED_SEPARATORS = (",", ";", "\t", "|")
_DOUBLED = re.compile(r'[^,;\t|\r\n]""|""[^,;\t|\r\n]')
"""A doubled quote that is not an empty field."""
_ESCAPED = re.compile(r'\\"[^,;\t|\r\n]|(?:^|[,;\t|\r\n])[^,;\t|\r\n"]*\\"')
"""A quote after a backslash that probably does not end a quoted field."""

_NAMED_SEPARATOR = re.compile(rb"(?:\xef\xbb\xbf)?sep=([^\r\n])\r?\n")
_UTF8 = "utf-8-sig"


@dataclass(frozen=True)
class Dialect:
    """How a file writes fields. A quote inside quotes is doubled or follows `escape`; if `quote` is empty, no field is quoted."""

    separator: str = ","
    quote: str = _DOUBLE
    escape: str = ""
    encoding: str = _UTF8
    skips_blanks: bool = False

    def records(self, lines: Iterable[str]) -> Any:
        """Return a strict `csv.reader` over the lines: a quote out of place is an error, and `line_num` is the reader's position."""
        csv.field_size_limit(MAX_LINE_BYTES)
        return csv.reader(
            self._with_plain_backslashes(lines) if self.escape else lines,
            delimiter=self.separator,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            escapechar=self.escape or None,
            doublequote=True,  # even with an escape: otherwise the reader accepts a quote out of place
            skipinitialspace=self.skips_blanks,
            strict=True,
        )

    def _with_plain_backslashes(self, lines: Iterable[str]) -> Iterator[str]:
        """Double an escape that escapes nothing, as in a path: the reader would drop it."""
        escape, escaped = re.escape(self.escape), {self.escape, self.quote, self.separator}
        pair = re.compile(f"{escape}(.)", re.DOTALL)
        for line in lines:
            yield pair.sub(lambda match: match[0] if match[1] in escaped else self.escape + match[0], line) if self.escape in line else line

    def simple_lines(self) -> re.Pattern[bytes]:
        """Return a pattern for lines that are one record each, with every quote around a field or doubled inside one."""
        separator, quote = re.escape(self.separator.encode()), re.escape(self.quote.encode())
        plain = b"[^" + separator + quote + rb"\r\n]*+"
        field = (
            plain if not quote else b"(?:" + quote + b"(?:[^" + quote + rb"\r\n]|" + quote + quote + b")*+" + quote + b"|" + plain + b")"
        )
        line = field + b"(?:" + separator + field + b")*+"
        return re.compile(b"(?:" + line + rb"\r?\n)*+(?:" + line + b")?")


def find_dialect(sample: bytes, is_whole: bool, settings: CsvConfig) -> Dialect:
    """Return the dialect under which the first records have as many fields as the header; no I/O.

    If several or none fit, the one with the most header fields wins; ties go to comma and double quotes. Single quotes are quotes only
    if the whole header is in them. A backslash is an escape if one precedes a quote inside a field and no quote is doubled, or if the file
    cannot be read otherwise.
    """
    encoding = _encoding(sample, settings)
    text = _decode(sample, encoding)
    lines = list(io.StringIO(text, newline="\n" if "\n" in text else None))  # not `splitlines`, which also splits at form feeds
    if not is_whole and len(lines) > 1:
        lines.pop()
    first = lines[0].strip() if lines else ""
    in_single = len(first) > 1 and first[0] == first[-1] == _SINGLE
    quotes = (_SINGLE, _DOUBLE) if in_single else (_DOUBLE,)
    candidates = product(
        _escapes(text) if settings.escape == AUTO else (settings.escape,),
        quotes if settings.quote == AUTO else (settings.quote,),
        _DETECTED_SEPARATORS if settings.separator == AUTO else (settings.separator,),
    )
    best, best_score = Dialect(encoding=encoding), (False, 0)
    for escape, quote, separator in candidates:
        skips_blanks = 0 < first.count(separator) == first.count(f"{separator} ")
        dialect = Dialect(separator, quote, escape, encoding, skips_blanks)
        score = _fit(dialect, lines, is_whole)
        if score > best_score:
            best, best_score = dialect, score
    return best


def _decode(sample: bytes, encoding: str) -> str:
    try:
        return codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    except UnicodeError:  # reported with the line number when the lines are read
        return ""


def _escapes(text: str) -> tuple[str, ...]:
    """Return the possible escapes, the most likely first."""
    if _BACKSLASH not in text:
        return ("",)
    is_escape = _ESCAPED.search(text) and not _DOUBLED.search(text)
    return (_BACKSLASH, "") if is_escape else ("", _BACKSLASH)


def _fit(dialect: Dialect, lines: Sequence[str], is_whole: bool) -> tuple[bool, int]:
    """Return whether the first records all have the header's number of fields, at least two, and that number."""
    records: list[list[str]] = []
    fits = True
    try:
        records += (record for record in islice(dialect.records(lines), _SAMPLE_RECORDS) if record)
    except csv.Error as error:
        # The sample may end inside quotes.
        fits = not is_whole and "unexpected end of data" in str(error)
    num_fields = len(records[0]) if records else 0
    return fits and num_fields > 1 and all(len(record) == num_fields for record in records), num_fields


def _encoding(sample: bytes, settings: CsvConfig) -> str:
    if settings.encoding != AUTO:
        return settings.encoding
    return "utf-16" if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else _UTF8


def read_names(storage: Storage, uri: str, settings: CsvConfig) -> list[str]:
    """Read a file's column names.

    Raises:
        UserError: the file is empty, or its first line is not a header.
    """
    with _open_records(storage, uri, settings) as (names, *_):
        return names


def read_delimited(storage: Storage, uri: str, columns: Sequence[str], settings: CsvConfig) -> Iterator[pa.Table]:
    """Read some columns batch by batch, as text; an empty field is null.

    Raises:
        UserError: a record has more or fewer fields than the header, or a quote is out of place; the error names the line.
    """
    with _open_records(storage, uri, settings) as (names, dialect, blocks, num_header_lines):
        num_lines, simple = num_header_lines, dialect.simple_lines()
        for block in blocks:
            table = _read_simple(block, names, columns, dialect, simple)
            if table is not None:
                num_lines += block.count(b"\n")
                yield table
                continue
            # From here on record by record: a record in quotes may continue in the next block.
            lines = (line for content in chain((block,), blocks) for line in io.BytesIO(content))
            yield from _read_records(uri, lines, num_lines, names, columns, dialect)


def _read_simple(
    content: bytes, names: Sequence[str], columns: Sequence[str], dialect: Dialect, simple: re.Pattern[bytes]
) -> pa.Table | None:
    """Read lines that are one record each with all quotes in place; return None for other lines or another number of fields."""
    has_escape = bool(dialect.escape) and dialect.escape.encode() in content
    if has_escape or dialect.skips_blanks or not simple.fullmatch(content):
        return None
    parsing = arrow_csv.ParseOptions(delimiter=dialect.separator, quote_char=dialect.quote or False, double_quote=True, escape_char=False)
    reading = arrow_csv.ReadOptions(use_threads=False, column_names=list(names), block_size=len(content) + 1)
    try:
        return arrow_csv.read_csv(io.BytesIO(content), reading, parsing, as_text(columns))
    except pa.ArrowInvalid:
        return None


def as_text(columns: Sequence[str]) -> arrow_csv.ConvertOptions:
    """Return the options for Arrow to read columns as text, an empty field as null."""
    types = dict.fromkeys(columns, pa.string())
    return arrow_csv.ConvertOptions(include_columns=list(columns), column_types=types, strings_can_be_null=True, null_values=[""])


def _read_records(
    uri: str, lines: Iterable[bytes], num_before: int, names: Sequence[str], columns: Sequence[str], dialect: Dialect
) -> Iterator[pa.Table]:
    places = [names.index(column) for column in columns]
    rows: list[list[str]] = []
    num_bytes = 0
    records = dialect.records(_decoded(uri, lines, num_before))
    for record in _checked(uri, records, num_before, names):
        rows.append(record)
        num_bytes += sum(map(len, record))
        if len(rows) == text_lines.BATCH_ROWS or num_bytes >= _RECORDS_BYTES:
            yield _table(rows, places, columns)
            rows, num_bytes = [], 0
    if rows:
        yield _table(rows, places, columns)


def _table(rows: Sequence[Sequence[str]], places: Sequence[int], columns: Sequence[str]) -> pa.Table:
    return pa.table([pa.array([row[place] or None for row in rows], pa.string()) for place in places], list(columns))


def _checked(uri: str, records: Any, num_before: int, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield records and check that each has as many fields as the header; blank lines are skipped."""
    begin = num_before + 1
    while True:
        try:
            record = next(records, None)
        except csv.Error as error:
            raise UserError(
                f"{uri}: the record that begins in line {begin}: a quote is out of place or not closed, or the line has none of the "
                f"known ends ({error}); data.csv.quote and data.csv.escape say how quotes are written"
            ) from None
        if record is None:
            return
        if record and len(record) != len(names):
            shown = ",".join(record)[:80]
            raise UserError(f"{uri}: the record in line {begin} has {len(record)} fields; its header has {len(names)} ({shown})")
        if record:
            yield record
        begin = num_before + records.line_num + 1


def _decoded(uri: str, lines: Iterable[bytes], num_before: int) -> Iterator[str]:
    for number, line in enumerate(lines, start=num_before + 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            shown = line[max(0, error.start - 20) : error.start + 20].decode("latin-1")
            raise UserError(
                f"{uri}: line {number} is not UTF-8 (near '{shown.strip()}'); data.csv.encoding = 'cp1252' or another would read it"
            ) from None


@contextmanager
def _open_records(storage: Storage, uri: str, settings: CsvConfig) -> Iterator[tuple[list[str], Dialect, Iterator[bytes], int]]:
    """Open a file after its header: column names, dialect, blocks of the following lines in UTF-8, and the number of lines read."""
    with open_stream(storage, uri) as stream:
        sample = stream.read(HEADER_BYTES)
    has_newlines = b"\n" in sample
    if len(sample) == HEADER_BYTES and not has_newlines and b"\r" not in sample:
        raise UserError(f"{uri}: its first line, the header, is longer than {HEADER_BYTES} bytes")
    named = _NAMED_SEPARATOR.match(sample)
    if named:  # spreadsheets write this line; it is not data
        sample, settings = sample[named.end() :], settings.model_copy(update={"separator": named[1].decode()})
    dialect = find_dialect(sample, len(sample) < HEADER_BYTES, settings)
    with open_stream(storage, uri) as stream:
        is_plain = dialect.encoding == _UTF8 and has_newlines
        lines = _without_mark(read_lines(uri, stream)) if is_plain else _recoded(uri, stream, dialect.encoding, has_newlines)
        num_before = 1 if named and next(lines) else 0
        records = dialect.records(_decoded(uri, lines, num_before))
        names = [name.strip() for name in next(_checked_header(uri, records), ())]
        if not any(names):
            raise UserError(f"{uri}: is empty; its first line must be a header")
        blocks = read_blocks(uri, stream) if is_plain else (b"".join(batch) for _, batch in batches(lines))
        yield _without_repeats(uri, names), dialect, blocks, num_before + records.line_num


def _checked_header(uri: str, records: Any) -> Iterator[list[str]]:
    try:
        yield from islice((record for record in records if record), 1)
    except csv.Error as error:
        raise UserError(f"{uri}: its first line, the header, cannot be read ({error})") from None


def _without_repeats(uri: str, names: list[str]) -> list[str]:
    """Refuse two columns of the same name; columns without a name are numbered by their place."""
    named = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    repeated = next((name for place, name in enumerate(named) if name in named[:place]), None)
    if repeated is not None:
        raise UserError(f"{uri}: has two columns named '{repeated[:80]}'; rename one of them in its first line")
    return named


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    yield next(lines, b"").removeprefix(codecs.BOM_UTF8)
    yield from lines


def _recoded(uri: str, stream: io.BufferedReader, encoding: str, has_newlines: bool) -> Iterator[bytes]:
    r"""Yield a file's lines in UTF-8; lines that end with \r alone end with \n."""
    text = io.TextIOWrapper(stream, encoding, newline="" if has_newlines else None)
    try:
        yield from read_lines(uri, text)
    except UnicodeError as error:
        raise UserError(f"{uri}: is not in {encoding} ({error}); data.csv.encoding says what it is in") from None
