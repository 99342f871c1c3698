"""Builds a dataset's catalogue: text, category vocabulary, standardized numbers, vectors."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Floats, Integers
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import MAX_TEXT_CHARACTERS, UNPRINTABLE, cut, fold, is_long, is_negative, normalize_text
from recsys.ingest.clean.rejects import Rejects
from recsys.ingest.sources.formats import INPUT_ORDER
from recsys.ingest.sources.item_columns import as_vectors, title_column
from recsys.ingest.sources.scalars import numbers_of, spell
from recsys.schema import CATALOGUE_SCHEMA, ITEM_ID, FeatureKind

_DIGITS = re.compile(r"([0-9]+)")
_LARGEST_NUMBER = 1e100
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Catalogue:
    """The catalogue's table (CATALOGUE_SCHEMA), the meaning of its indices and numbers, and counts of oddities in its text."""

    table: pa.Table
    category_vocabulary: tuple[str, ...]
    number_columns: tuple[str, ...]
    number_moments: tuple[tuple[float, float], ...]
    vector_size: int
    noticed: Counter[str]


def sort_ids(ids: list[str]) -> list[str]:
    """Sort ids in natural order: runs of digits compare as numbers, so that "10" comes after "9"."""
    return sorted(ids, key=_natural_key)


def _natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    # A run of digits is compared as (length, text) without leading zeros: int() refuses very long ones.
    parts = _DIGITS.split(text)
    key = [(0, len(part.lstrip("0")), part.lstrip("0")) if index % 2 else (1, 0, part) for index, part in enumerate(parts) if part]
    return key, text


def clean_items(items: pa.Table, reject_negative_ids: bool = False) -> tuple[pa.Table, Rejects]:
    """Keep the first row, by input order, of each item with a valid id; count the dropped rows."""
    rejects = Rejects()

    def drop(rule: str, table: pa.Table, is_dropped: pa.ChunkedArray) -> pa.Table:
        rejects.add(rule, is_dropped, table[INPUT_ORDER], table[ITEM_ID])
        return table.filter(pc.invert(is_dropped))

    items = drop("catalogue_null_id", items, items[ITEM_ID].is_null())
    items = drop("catalogue_long_id", items, is_long(items[ITEM_ID]))
    if reject_negative_ids:
        items = drop("catalogue_negative_id", items, is_negative(items[ITEM_ID]))
    firsts = items.group_by(ITEM_ID, use_threads=False).aggregate([(INPUT_ORDER, "min")])[f"{INPUT_ORDER}_min"]
    is_first = pc.is_in(items[INPUT_ORDER], value_set=firsts.combine_chunks())
    return drop("catalogue_duplicate", items, pc.invert(is_first)), rejects


def build_catalogue(
    ids: pa.Array,
    items: pa.Table | None,
    kinds: dict[str, FeatureKind],
    train_counts: Integers,
    measured: Mapping[str, Floats] | None = None,
    vocabulary: tuple[str, ...] = (),
    moments: tuple[tuple[float, float], ...] | None = None,
    vector_size: int = 0,
) -> Catalogue:
    """Build the catalogue in the order of `ids`; an item without a row has no features.

    `title` is the text column with a title's name, or else the first one. `text` is all text columns joined by ". ", the title first.
    Both are normalized by `normalize_text`. `measured` adds number columns by item, NaN where missing. A number's mean and standard
    deviation are over the catalogue, unless `moments` gives them. New categories are added at the end of the given `vocabulary`. A
    missing vector is zeros; `vector_size` is its length if no column has vectors.
    """
    num_items = len(ids)
    known = items if items is not None else pa.table({ITEM_ID: pa.array([], pa.string())})
    rows = known.take(pc.index_in(ids, value_set=known[ITEM_ID].combine_chunks()))
    columns: dict[FeatureKind, list[str]] = {"text": [], "categories": [], "numbers": [], "vectors": []}
    for name, kind in kinds.items():
        columns[kind].append(name)
    if (title := title_column(columns["text"])) is not None:
        columns["text"].sort(key=lambda name: name != title)
    texts, noticed = _texts([_strings(rows[name]) for name in columns["text"]], num_items)
    categories, vocabulary, num_changed = _categories(rows, columns["categories"], num_items, vocabulary)
    raw_numbers = {name: _numbers(rows[name]) for name in columns["numbers"]} | dict(measured or {})
    moments = moments if moments is not None else tuple(_moments(numbers) for numbers in raw_numbers.values())
    numbers = [(column - mean) / deviation for column, (mean, deviation) in zip(raw_numbers.values(), moments, strict=True)]
    vectors = [_vectors(rows[name], name) for name in columns["vectors"]]
    vectors = vectors or [np.zeros((num_items, vector_size))]
    table = pa.table(
        [
            pa.array(np.arange(1, num_items + 1), pa.int32()),
            ids,
            pa.array([parts[0] if parts else "" for parts in texts], pa.string()),
            pa.array([_joined(parts) for parts in texts], pa.string()),
            categories,
            _fixed_lists(np.stack(numbers, axis=1) if numbers else np.zeros((num_items, 0))),
            _fixed_lists(np.concatenate(vectors, axis=1)),
            pa.array(train_counts, pa.int64()),
        ],
        schema=CATALOGUE_SCHEMA,
    )
    return Catalogue(
        table,
        vocabulary,
        tuple(raw_numbers),
        moments,
        sum(block.shape[1] for block in vectors),
        +(noticed + Counter(category_changed=num_changed)),
    )


def _joined(parts: list[str]) -> str:
    return cut(". ".join(part for part in parts if part))


def _texts(columns: list[list[str]], num_items: int) -> tuple[list[list[str]], Counter[str]]:
    """Normalize each item's texts, and count the items whose texts lose characters, or are cut alone or when joined."""
    texts: list[list[str]] = []
    noticed: Counter[str] = Counter()
    for raw in zip(*columns, strict=True) if columns else [()] * num_items:
        folded = [fold(text) for text in raw]
        noticed["text_unprintable"] += any(UNPRINTABLE.search(text) for text in raw)
        noticed["text_cut"] += len(". ".join(text for text in folded if text)) > MAX_TEXT_CHARACTERS
        texts.append([cut(text) for text in folded])
    return texts, +noticed


def _strings(column: pa.ChunkedArray) -> list[str]:
    texts = spell(column)
    return [text or "" for text in (pc.binary_join(texts, " ") if pa.types.is_list(texts.type) else texts).to_pylist()]


def _categories(rows: pa.Table, names: list[str], num_items: int, known: tuple[str, ...]) -> tuple[pa.Array, tuple[str, ...], int]:
    """Return the category indices of each item, the vocabulary, and how many entries lost characters or were cut."""
    values: list[list[str]] = [[] for _ in range(num_items)]
    vocabulary = list(known)
    num_changed = 0
    for name in names:
        column = rows[name]
        is_list = pa.types.is_list(column.type)
        texts = spell(column).to_pylist()
        found: set[str] = set()
        for of_row, entry in zip(values, texts, strict=True):
            entries = (entry or []) if is_list else [entry]
            changed = {text: normalize_text(text) for text in entries if text}
            num_changed += sum(len(text) > MAX_TEXT_CHARACTERS or bool(UNPRINTABLE.search(text)) for text in changed)
            of_item = sorted({f"{name}={text}" for text in changed.values() if text}, key=_natural_key)
            of_row.extend(of_item)
            found.update(of_item)
        vocabulary += sort_ids(list(found.difference(known)))
    index = {text: position for position, text in enumerate(vocabulary, start=1)}
    return pa.array([[index[text] for text in row] for row in values], pa.list_(pa.int32())), tuple(vocabulary), num_changed


def _numbers(column: pa.ChunkedArray) -> Floats:
    numbers: Floats = numbers_of(column).to_numpy(zero_copy_only=False).astype(np.float64)
    numbers[~(np.abs(numbers) <= _LARGEST_NUMBER)] = np.nan
    return numbers


def _moments(numbers: Floats) -> tuple[float, float]:
    """Return mean and standard deviation of the values that are not NaN: 0 and 1 without any, deviation 1 if all are equal."""
    if np.isnan(numbers).all():
        return 0.0, 1.0
    mean, deviation = float(np.nanmean(numbers)), float(np.nanstd(numbers))
    # The deviation of a constant column is a rounding error, not zero.
    return mean, deviation if deviation > _ROUNDING * abs(mean) else 1.0


def _vectors(column: pa.ChunkedArray, name: str) -> Floats:
    lists = as_vectors(column, name).combine_chunks()
    sizes = pc.unique(pc.list_value_length(lists).drop_null()).to_pylist()
    if len(sizes) != 1:
        raise UserError(f"data.item_features.vectors: column '{name}' must have one length in all rows; it has {sorted(sizes)[:5]}")
    block = np.zeros((len(lists), sizes[0]))
    block[lists.is_valid().to_numpy(zero_copy_only=False)] = (
        pc.fill_null(lists.flatten(), 0.0).to_numpy(zero_copy_only=False).reshape(-1, sizes[0])
    )
    return np.asarray(np.nan_to_num(block, posinf=0.0, neginf=0.0))


def _fixed_lists(block: Floats) -> pa.Array:
    offsets = np.arange(block.shape[0] + 1, dtype=np.int32) * block.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.reshape(-1), pa.float32()))
