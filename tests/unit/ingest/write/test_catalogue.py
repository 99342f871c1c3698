"""The catalogue: natural order, text rules, vocabulary, standardized numbers, vectors, items without a row."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import UserError
from recsys.ingest.write.catalogue import MAX_TEXT_CHARACTERS, build_catalogue, clean_items, normalize_text, sort_ids

KINDS = {
    "title": "text",
    "about": "text",
    "tags": "categories",
    "color": "categories",
    "price": "numbers",
    "flat": "numbers",
    "v": "vectors",
}


def test_ids_sort_as_a_person_would() -> None:
    assert sort_ids(["10", "9", "b2", "b10", "a", "01", "1", "-1"]) == ["01", "1", "9", "10", "-1", "a", "b2", "b10"]
    assert sort_ids(["9" * 5000 + "1", "9" * 5000]) == ["9" * 5000, "9" * 5000 + "1"]


@given(st.lists(st.text(max_size=5), unique=True))
def test_the_order_of_ids_is_total_and_does_not_depend_on_the_input(ids: list[str]) -> None:
    assert sort_ids(ids) == sort_ids(list(reversed(ids)))


def test_text_is_normalized() -> None:
    assert normalize_text(" a\x00b\tc\r\n\x1b  d\ud800\u2003e ") == "ab c de".replace("de", "d e")
    assert len(normalize_text("x" * 1_000_000)) == MAX_TEXT_CHARACTERS


def test_the_first_row_of_an_item_counts() -> None:
    items = pa.table({"item_id": ["3", "2", "3", None], "t": ["a", "b", "c", "d"], "input_order": [5, 6, 7, 8]})
    kept, rejected = clean_items(items)
    assert kept.to_pylist() == [{"item_id": "3", "t": "a", "input_order": 5}, {"item_id": "2", "t": "b", "input_order": 6}]
    assert rejected == {"catalogue_null_id": 1, "catalogue_duplicate": 1}
    assert rejected.examples == {"catalogue_null_id": [(8, "null")], "catalogue_duplicate": [(7, "'3'")]}


def test_negative_ids_of_the_catalogue_go_only_where_the_config_says_so() -> None:
    items = pa.table({"item_id": ["-3", "a-3"], "input_order": [0, 1]})
    assert clean_items(items)[0]["item_id"].to_pylist() == ["-3", "a-3"]
    kept, rejected = clean_items(items, reject_negative_ids=True)
    assert kept["item_id"].to_pylist() == ["a-3"]
    assert rejected["catalogue_negative_id"] == 1


def test_the_catalogue_of_a_hand_made_table() -> None:
    items = pa.table(
        {
            "item_id": ["2", "1", "4"],
            "title": ["Two", " One\n", None],
            "about": ["more", None, None],
            "tags": [["b", "a", "a"], [], None],
            "color": ["red", None, "blue 10"],
            "price": ["3", "1", "none"],
            "flat": [5, 5, 5],
            "v": [[1.0, 2.0], None, [math.nan, 4.0]],
            "input_order": [0, 1, 2],
        }
    )
    made = build_catalogue(pa.array(["1", "2", "3", "4"]), items, KINDS, np.array([7, 0, 1, 2]))
    assert made.category_vocabulary == ("tags=a", "tags=b", "color=blue 10", "color=red")
    assert made.number_columns == ("price", "flat")
    assert made.vector_size == 2
    columns = made.table.to_pydict()
    assert columns["item_index"] == [1, 2, 3, 4]
    assert columns["item_id"] == ["1", "2", "3", "4"]
    assert columns["title"] == ["One", "Two", "", ""]
    assert columns["text"] == ["One", "Two. more", "", ""]
    assert columns["categories"] == [[], [1, 2, 4], [], [3]]
    assert [row[0] for row in columns["numbers"]][:2] == [-1.0, 1.0]
    assert [math.isnan(row[0]) for row in columns["numbers"]] == [False, False, True, True]
    assert [row[1] for row in columns["numbers"]][:2] == [0.0, 0.0]
    assert columns["vector"] == [[0, 0], [1, 2], [0, 0], [0, 4]]
    assert columns["train_count"] == [7, 0, 1, 2]


def test_without_an_item_table_every_item_is_bare() -> None:
    made = build_catalogue(pa.array(["1", "2"]), None, {}, np.array([1, 2]))
    assert made.table.to_pylist()[1] == {
        "item_index": 2,
        "item_id": "2",
        "title": "",
        "text": "",
        "categories": [],
        "numbers": [],
        "vector": [],
        "train_count": 2,
    }


def test_vectors_must_be_numbers_of_one_length() -> None:
    for column, message in (([[1.0], [1.0, 2.0]], r"one length in all rows; it has \[1, 2\]"), ([["x"], ["y"]], "not lists of numbers")):
        items = pa.table({"item_id": ["1", "2"], "v": column, "input_order": [0, 1]})
        with pytest.raises(UserError, match=message):
            build_catalogue(pa.array(["1", "2"]), items, {"v": "vectors"}, np.array([1, 1]))


def bytes_as_strings(*texts: bytes) -> pa.Array:
    """Return an Arrow string array that is not valid UTF-8, as careless writers leave in Parquet files."""
    raw = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_odd_text_is_mended_and_counted_by_item() -> None:
    items = pa.table(
        {
            "item_id": ["1", "2", "3", "4"],
            "title": bytes_as_strings(b"a\xed\xa0\x80b", b"fine", b"bell\x07", b"x" * 1_000_000),
            "about": ["x" * MAX_TEXT_CHARACTERS, "fine", "bell\x07", "short"],
            "color": bytes_as_strings(b"re\xffd", b"blue", b"blue", b""),
            "input_order": [0, 1, 2, 3],
        }
    )
    kinds = {name: KINDS[name] for name in ("title", "about", "color")}
    made = build_catalogue(pa.array(["1", "2", "3", "4"]), items, kinds, np.zeros(4, np.int64))
    texts = made.table["text"].to_pylist()
    assert made.table["title"].to_pylist() == ["ab", "fine", "bell", "x" * MAX_TEXT_CHARACTERS]
    assert texts[1:3] == ["fine. fine", "bell. bell"]
    assert [len(text) for text in texts] == [MAX_TEXT_CHARACTERS, 10, 10, MAX_TEXT_CHARACTERS]
    assert made.category_vocabulary == ("color=blue", "color=red")
    assert dict(made.noticed) == {"text_unprintable": 2, "text_cut": 2, "category_changed": 1}


def test_numbers_keep_the_moments_that_they_were_standardised_by() -> None:
    items = pa.table({"item_id": ["1", "2", "3"], "price": [1.0, 3.0, 1e200], "flat": [0.1, 0.1, 0.1], "input_order": [0, 1, 2]})
    measured = {"statistics.log_count": np.array([0.0, np.nan, 4.0])}
    made = build_catalogue(pa.array(["1", "2", "3"]), items, {"price": "numbers", "flat": "numbers"}, np.zeros(3, np.int64), measured)
    assert made.number_columns == ("price", "flat", "statistics.log_count")
    assert made.number_moments == ((2.0, 1.0), (pytest.approx(0.1), 1.0), (2.0, 2.0))
    numbers = np.array(made.table["numbers"].to_pylist())
    np.testing.assert_allclose(numbers, [[-1, 0, -1], [1, 0, np.nan], [np.nan, 0, 1]], atol=1e-12)
