"""Scalars: one spelling per value, for any type, file and format."""

import json
import unicodedata
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config.data import DataConfig
from recsys.ingest.clean.cleaning import cast_events, notice_rounded
from recsys.ingest.sources.column_mapping import import_events
from recsys.ingest.sources.formats import plan_parts
from recsys.ingest.sources.input_files import find_files
from recsys.ingest.sources.scalars import ids_of, numbers_of, parsed_lists, plain, simple_lists, spell
from recsys.schema import normalize_id
from recsys.store import Storage

Ids = list[int]
CARRIERS: dict[str, Callable[[Ids], pa.Array]] = {
    "string": lambda ids: pa.array(map(str, ids)),
    "large_string": lambda ids: pa.array(map(str, ids), pa.large_string()),
    "string_view": lambda ids: pa.array(map(str, ids), pa.string_view()),
    "binary": lambda ids: pa.array([str(number).encode() for number in ids]),
    "large_binary": lambda ids: pa.array([str(number).encode() for number in ids], pa.large_binary()),
    "dictionary": lambda ids: pa.array(map(str, ids)).dictionary_encode(),
    "dictionary of numbers": lambda ids: pa.array(ids).dictionary_encode(),
    "int64": lambda ids: pa.array(ids, pa.int64()),
    "uint64": lambda ids: pa.array(ids, pa.uint64()),
    "decimal": lambda ids: pa.array([Decimal(number) for number in ids], pa.decimal128(38, 0)),
    "decimal with places": lambda ids: pa.array([Decimal(number) for number in ids], pa.decimal128(38, 6)),
    "wide decimal": lambda ids: pa.array([Decimal(number) for number in ids], pa.decimal256(76, 10)),
    "double": lambda ids: pa.array(map(float, ids)),
    "padded": lambda ids: pa.array([f" {number}\t" for number in ids]),
}
TEXT_CARRIERS: dict[str, Callable[[int], str]] = {
    "csv": str,
    "csv of floats": lambda number: f"{number}.0",
    "jsonl": str,
    "jsonl of floats": lambda number: f"{number}.0",
}


def write_file(folder: Path, number: int, carrier: str, users: Ids, items: Ids) -> None:
    times = list(range(1, len(users) + 1))
    if carrier in CARRIERS:
        carry = CARRIERS[carrier]
        pq.write_table(pa.table({"user_id": carry(users), "item_id": carry(items), "timestamp": times}), folder / f"{number}.parquet")
        return
    spelled = TEXT_CARRIERS[carrier]
    if carrier.startswith("csv"):
        rows = [f"{spelled(user)},{spelled(item)},{time}" for user, item, time in zip(users, items, times, strict=True)]
        (folder / f"{number}.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    else:
        rows = [
            f'{{"user_id": {spelled(user)}, "item_id": {spelled(item)}, "timestamp": {time}}}'
            for user, item, time in zip(users, items, times, strict=True)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join([*rows, ""]))


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    storage = Storage(str(folder))
    data = DataConfig()
    parts = plan_parts(storage, find_files(storage, "events", str(folder)))
    events = [cast_events(raw) for part in parts for raw in import_events(storage, part, data, "timestamp")]
    assert not any(rejects for _, rejects in events)
    return [(row["user_id"], row["item_id"]) for table, _ in events for row in table.to_pylist()]


PAIRS = st.lists(st.tuples(st.integers(0, 2**53), st.integers(0, 2**53)), min_size=1, max_size=4)


@settings(max_examples=150)
@given(files=st.lists(st.tuples(st.sampled_from([*CARRIERS, *TEXT_CARRIERS]), PAIRS), min_size=1, max_size=4))
def test_any_mix_of_id_types_gives_the_ids_that_strings_give(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, list[tuple[int, int]]]]
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    for number, (carrier, pairs) in enumerate(files):
        write_file(folder, number, carrier, *(list(side) for side in zip(*pairs, strict=True)))
    assert read_pairs(folder) == [(str(user), str(item)) for _, pairs in files for user, item in pairs]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([2**53, 2**53 + 1, 10**37], pa.decimal128(38, 0)), [str(2**53), str(2**53 + 1), str(10**37)]),
        (pa.array([10**75 + 1], pa.decimal256(76, 0)), [str(10**75 + 1)]),
        (pa.array([Decimal("1.50"), Decimal("0.00"), Decimal("-3.00")], pa.decimal128(9, 2)), ["1.5", "0", "-3"]),
        (pa.array([4006381330001.0, 1e22, 0.1, -0.0]), ["4006381330001", "1" + 22 * "0", "0.1", "0"]),
        (pa.array([0.1, 16777216.0], pa.float32()), ["0.1", "16777216"]),
        (pa.array([Decimal("1.50"), Decimal("2.00")], pa.decimal32(5, 2)), ["1.5", "2"]),
        (pa.array([Decimal("12")], pa.decimal64(12, 0)), ["12"]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([-128], pa.int8()), ["-128"]),
        (pa.array([b"abc", b"\xff\x00"]), ["abc", "0xff00"]),
        (pa.array([b"abcd"], pa.binary(4)), ["abcd"]),
        (pa.array([uuid.UUID(int=5).bytes], pa.uuid()), [str(uuid.UUID(int=5))]),
        (pa.array(["007", "1e5", "12E4", "1.10", "1.0"]), ["007", "1e5", "12E4", "1.10", "1.0"]),
        (pa.array(["Cafe\u0301", "\u00a0x\u2003"]), ["Caf\u00e9", "x"]),
        (pa.array([True]), ["true"]),
        (pa.array([date(2024, 1, 31)]), ["2024-01-31"]),
    ],
)
def test_ids_of_every_type_keep_their_identity(column: pa.Array, texts: list[str]) -> None:
    assert ids_of(plain(pa.chunked_array([column])), "user_id").to_pylist() == texts


def test_missing_and_blank_ids_are_null() -> None:
    for column in (pa.array([float("nan"), float("inf"), None]), pa.array(["", " ", None]), pa.nulls(3)):
        assert ids_of(plain(pa.chunked_array([column])), "user_id").to_pylist() == [None, None, None]


def test_broken_text_gives_ids_that_stay_apart() -> None:
    raw = pa.array([b"a\xed\xa0\x80", b"a\xed\xa0\x81"], pa.binary())
    ids = ids_of(pa.chunked_array([pa.Array.from_buffers(pa.string(), 2, raw.buffers())]), "user_id").to_pylist()
    assert ids == [r"a\xed\xa0\x80", r"a\xed\xa0\x81"]


def test_json_and_parquet_spell_a_broken_id_alike(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text(json.dumps({"user_id": "a\ud800", "item_id": 1, "timestamp": 1}) + "\n")
    assert read_pairs(tmp_path) == [(r"a\xed\xa0\x80", "1")]


def test_the_service_spells_every_character_as_the_tables_do() -> None:
    texts = [f"{chr(code)}x{chr(code)}" for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    assert [text or "" for text in ids_of(pa.chunked_array([texts]), "user_id").to_pylist()] == [normalize_id(text) for text in texts]
    assert normalize_id(" Cafe\u0301 ") == unicodedata.normalize("NFC", "Caf\u00e9")


def test_ids_that_may_have_lost_digits_are_noticed() -> None:
    raw = {"user_id": ["4.00638E+12", "1e5", "1.2345678901234568e+18"], "item_id": [2.0**53 + 2, 7.0, 2.0**53]}
    assert notice_rounded(pa.table(raw)) == {"rounded_id": 2}
    assert notice_rounded(pa.table({"user_id": pa.array([16777218.0], pa.float32()), "item_id": [1]})) == {"rounded_id": 1}


def test_numbers_of_every_type() -> None:
    moment = datetime(1970, 1, 2, tzinfo=UTC)
    columns: list[tuple[Any, list[float | None]]] = [
        ([True, False, None], [1.0, 0.0, None]),
        (["True", "false", " 2.5 ", "x", "1e3"], [1.0, 0.0, 2.5, None, 1000.0]),
        ([b"3", b"\xff"], [3.0, None]),
        ([Decimal("1.25")], [1.25]),
        ([date(1970, 1, 11)], [10.0]),
        ([moment], [86400.0]),
        ([time(1, 0, 0, 500_000)], [3600.5]),
        ([timedelta(seconds=90)], [90.0]),
        ([[1.0]], [None]),
    ]
    for values, expected in columns:
        assert numbers_of(pa.chunked_array([pa.array(values)])).to_pylist() == expected


def test_lists_become_lists_of_scalars() -> None:
    def simple(values: list[Any]) -> list[Any]:
        return spell(simple_lists(plain(pa.chunked_array([pa.array(values)])))).to_pylist()

    assert simple([[{"id": 1, "name": "A"}, {"id": 2, "name": None}], None, []]) == [["A", None], None, []]
    assert simple([[{"code": 5, "genre": "x"}]]) == [["x"]]
    assert simple([[{"code": 5}]]) == [["5"]]
    assert simple([[["a", "b"], None, ["c"]], None]) == [["a", "b", "c"], None]
    assert simple([[[{"name": "deep"}]]]) == [["deep"]]
    sliced = pa.array([["x"], ["a", "b"], None, ["c"]]).slice(1, 3)
    assert spell(simple_lists(pa.chunked_array([sliced]))).to_pylist() == [["a", "b"], None, ["c"]]


def test_text_that_is_lists_throughout_is_read_as_lists() -> None:
    def parsed(texts: list[str | None]) -> Any:
        column = parsed_lists(pa.chunked_array([pa.array(texts, pa.string())]))
        return None if column is None else column.to_pylist()

    assert parsed(['["a", "b"]', None, " ", "[]"]) == [["a", "b"], None, None, []]
    assert parsed(["['Action', \"Kids' TV\"]"]) == [["Action", "Kids' TV"]]
    assert parsed(["[{'id': 1, 'name': 'Drama'}]"]) == [[{"id": 1, "name": "Drama"}]]
    assert parsed(["[REC]", "[REC] 2"]) is None
    assert parsed(['["a"]', "plain"]) is None
    assert parsed(["[" * 100_000]) is None
    assert parsed([None]) is None
