"""CSV dialects: the written values are read back, or a one-line error says where this fails."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recsys.config.data import CsvConfig
from recsys.errors import UserError
from recsys.ingest.sources import delimited, lines
from recsys.ingest.sources.delimited import find_dialect, read_delimited, read_names
from recsys.store import Storage

NAMES = ["user_id", "item_id", "title"]


def read(folder: Path, content: bytes, **settings_: str) -> tuple[list[str], list[list[str | None]]]:
    path = folder / "a.csv"
    path.write_bytes(content)
    storage, dialect = Storage(str(folder)), CsvConfig(**settings_)
    names = read_names(storage, str(path), dialect)
    rows = [list(row.values()) for table in read_delimited(storage, str(path), names, dialect) for row in table.to_pylist()]
    return names, rows


def write(rows: list[list[str]], encoding: str, **dialect: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue().encode(encoding)


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=12)


@settings(max_examples=400)
@given(
    rows=st.lists(st.lists(FIELDS, min_size=3, max_size=3), min_size=1, max_size=6),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    has_backslash=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_dialect_is_told_from_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    separator: str,
    quoting: int,
    has_backslash: bool,
    line_end: str,
    encoding: str,
) -> None:
    quotes = {"doublequote": False, "escapechar": "\\"} if has_backslash else {"doublequote": True}
    content = write([NAMES, *rows], encoding, delimiter=separator, quoting=quoting, lineterminator=line_end, **quotes)
    # A backslash is detected as an escape only if one precedes a quote.
    assume(
        not has_backslash or not any("\\" in field for row in rows for field in row) or any('"' in field for row in rows for field in row)
    )
    names, found = read(tmp_path_factory.mktemp("csv"), content)
    assert names == NAMES
    assert found == [[field or None for field in row] for row in rows]


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(FIELDS, min_size=3, max_size=3), min_size=1, max_size=6),
    separator=st.sampled_from([",", ";", "\t", "|", ":", "~"]),
    quote=st.sampled_from(['"', "'"]),
    has_backslash=st.booleans(),
)
def test_any_dialect_that_is_given_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], separator: str, quote: str, has_backslash: bool
) -> None:
    quotes = {"doublequote": False, "escapechar": "\\"} if has_backslash else {"doublequote": True}
    content = write([NAMES, *rows], "utf-8", delimiter=separator, quotechar=quote, **quotes)
    given_ = {"separator": separator, "quote": quote, "escape": "\\" if has_backslash else ""}
    assert read(tmp_path_factory.mktemp("csv"), content, **given_)[1] == [[field or None for field in row] for row in rows]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'"User-ID";"ISBN"\n"7";"0;X"\n', [["7", "0;X"]]),
        (b'a;b\n"She said \\"hi\\"; twice";2\n', [['She said "hi"; twice', "2"]]),
        (b'a,b,c\n,\x0c,"\n\\"\n', [[None, "\x0c", "\n\\"]]),
        (b'"a","b","c"\n"","","\\"\n"\n0","",""\n', [[None, None, "\\"], ["\n0", None, None]]),
        (b'a,b\n"5\\"",2\n', [['5"', "2"]]),
        (b'a,b\n"x\\",y",2\n', [['x",y', "2"]]),
        (b"a|b\n1,5|2\n", [["1,5", "2"]]),
        (b"'a','b'\n'it''s','x'\n", [["it's", "x"]]),
        (b"a,b\n'Til Dawn','Round Midnight'\n", [["'Til Dawn'", "'Round Midnight'"]]),
        (b'a, b\n1, "x, y"\n', [["1", "x, y"]]),
        (b'a,b\n5" disk,2\n', [['5" disk', "2"]]),
        (b'a,b\nC:\\temp,2\n"C:\\dir",3\n', [["C:\\temp", "2"], ["C:\\dir", "3"]]),
        (b"a,b\r1,2\r3,4\r", [["1", "2"], ["3", "4"]]),
        (b'a,b\n"A \\"big\\" lamp",C:\\temp\\new\n"x \\\\ y",\\N\n', [['A "big" lamp', "C:\\temp\\new"], ["x \\ y", "\\N"]]),
        (b"sep=;\r\na;b\r\n1;2,5\r\n", [["1", "2,5"]]),
        (b"\na,b\n1,2\n", [["1", "2"]]),
        (b"\xef\xbb\xbfa,b\n\n1,2\n\n", [["1", "2"]]),
        ("a\tb\n\u00e9\t2\n".encode("utf-16"), [["\u00e9", "2"]]),
        (b'a,b\n"",\n', [[None, None]]),
    ],
)
def test_dialects_as_people_have_them(tmp_path: Path, content: bytes, rows: list[list[str]]) -> None:
    assert read(tmp_path, content)[1] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", "the record in line 3 has 3 fields; its header has 2 (1,2,3)"),
        (b"a;b\n1;2\n1\n", "the record in line 3 has 1 fields; its header has 2"),
        (b'a,b\n1,2\n"x"y,3\n', "the record that begins in line 3: a quote is out of place"),
        (b'a,b\n"1\n2",3\n"x,3\n4,5\n', "the record that begins in line 4: a quote is out of place or not closed"),
        (b"a,b\n1,2\rx,3\n", "the record that begins in line 2"),
        (b"a,a\n1,2\n", "has two columns named 'a'"),
        (b"a,b\ncaf\xe9,2\n", "line 2 is not UTF-8 (near 'caf\u00e9,2'); data.csv.encoding = 'cp1252'"),
        (b"", "is empty; its first line must be a header"),
        (b",\n", "is empty"),
    ],
)
def test_what_cannot_be_read_rightly_is_one_line_with_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_given_encodings_and_no_quotes(tmp_path: Path) -> None:
    assert read(tmp_path, "a,b\ncaf\u00e9,2\n".encode("cp1252"), encoding="cp1252")[1] == [["caf\u00e9", "2"]]
    with pytest.raises(UserError, match="is not in utf-16"):
        read(tmp_path, b"a,b\n1,2\n\xd8", encoding="utf-16")
    assert read(tmp_path, b'a\tb\n"The\tLast"\n', quote="")[1] == [['"The', 'Last"']]


def test_records_go_on_from_batch_to_batch_and_lines_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 8)
    content = b'a,b\n1,2\n3,4\n5,"x\ny\nz"\n6,7\n'
    assert read(tmp_path, content)[1] == [["1", "2"], ["3", "4"], ["5", "x\ny\nz"], ["6", "7"]]
    with pytest.raises(UserError, match="the record in line 8 has 1 fields"):
        read(tmp_path, content + b"8\n")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"a;b\r\n1;2\r\n\r\n3;\r\n", [["1", "2"], ["3", None]]),
        (b'a,b\n"x, y","say ""hi"""\n"",z', [["x, y", 'say "hi"'], [None, "z"]]),
    ],
)
def test_lines_with_every_quote_in_place_are_arrows_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, rows: list[list[str | None]]
) -> None:
    monkeypatch.setattr(delimited, "_read_records", lambda *arguments: pytest.fail("record by record"))
    assert read(tmp_path, content)[1] == rows


def test_a_sample_may_end_within_quotes() -> None:
    sample = b"a;b\n" + b'1;"x, y"\n' * 10 + b'2;"cut\nhere'
    assert find_dialect(sample, is_whole=False, settings=CsvConfig()).separator == ";"


@pytest.mark.parametrize(
    "values",
    [{"separator": ";;"}, {"separator": ""}, {"quote": "ab"}, {"escape": "\u00e9"}, {"encoding": "klingon"}, {"separator": "\n"}],
)
def test_dialects_that_cannot_be_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"data\.csv\."):
        CsvConfig(**values)


def test_tabs_may_be_named() -> None:
    assert [CsvConfig(separator=name).separator for name in ("\\t", "tab", "\t")] == ["\t"] * 3
