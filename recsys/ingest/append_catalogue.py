"""The catalogue rows that an appended version adds: new items and changed ones."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.arrays import Floats
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.write.catalogue import Catalogue, build_catalogue
from recsys.schema import CATALOGUE_SCHEMA, ITEM_ID, FeatureKind


def changed_items(base: Dataset, ids: pa.Array, items: pa.Table | None, kinds: dict[str, FeatureKind]) -> Catalogue:
    """Lay out the rows of the items that are not among the first of `ids`, which are the base's, and of those that changed.

    Categories extend the base's vocabulary at its end; numbers are standardised by its moments.

    Raises:
        UserError: the item table has other features than the base's.
    """
    rows = base.catalogue_rows
    listed = items[ITEM_ID] if items is not None else pa.chunked_array([], pa.string())
    is_new = np.arange(len(ids)) >= rows.num_rows
    candidates = np.flatnonzero(is_new | pc.is_in(ids, value_set=pc.unique(listed)).to_numpy(zero_copy_only=False))
    catalogue = _laid_out(base, ids, candidates, items, kinds) if items is not None else _blank(base, ids.take(pa.array(candidates)))
    train_count = np.append(rows["train_count"].to_numpy(), np.zeros(int(is_new.sum()), np.int64))
    table = catalogue.table.set_column(0, CATALOGUE_SCHEMA.field("item_index"), pa.array(candidates + 1, pa.int32()))
    table = table.set_column(table.num_columns - 1, CATALOGUE_SCHEMA.field("train_count"), pa.array(train_count[candidates]))
    before = rows.take(pa.array(candidates[~is_new[candidates]]))
    is_same = np.zeros(table.num_rows, bool)
    is_same[: before.num_rows] = _same(before, table.slice(0, before.num_rows))
    return Catalogue(
        table.filter(pa.array(~is_same)),
        catalogue.category_vocabulary,
        catalogue.number_columns,
        catalogue.number_moments,
        catalogue.vector_size,
        catalogue.noticed,
    )


def _laid_out(base: Dataset, ids: pa.Array, candidates: Any, items: pa.Table, kinds: dict[str, FeatureKind]) -> Catalogue:
    manifest = base.manifest
    features = manifest.data_config.get("item_features", {})
    if {name for kind in set(kinds.values()) for name in features.get(kind, ())} != set(kinds):
        raise UserError(
            "data.items: the base dataset was made without the item features "
            f"{', '.join(kinds)}; leave data.items out, or prepare a new dataset from all events"
        )
    vocabulary, moments = manifest.category_vocabulary, manifest.number_moments
    measured = _measured(base, candidates, [name for name, kind in kinds.items() if kind == "numbers"])
    nothing = np.zeros(len(candidates), np.int64)
    catalogue = build_catalogue(ids.take(pa.array(candidates)), items, kinds, nothing, measured, vocabulary, moments)
    if catalogue.vector_size != manifest.vector_size:
        raise UserError(f"data.items: its vectors have {catalogue.vector_size} numbers; the base dataset's have {manifest.vector_size}")
    return catalogue


def _measured(base: Dataset, candidates: Any, listed: list[str]) -> dict[str, Floats]:
    """Return the base's number columns that no item table has, as they were before they were standardised; NaN for a new item."""
    measured: dict[str, Floats] = {}
    for position, (name, (mean, deviation)) in enumerate(zip(base.manifest.number_columns, base.manifest.number_moments, strict=True)):
        if name not in listed:
            known = pc.list_element(base.catalogue_rows["numbers"], position).to_numpy().astype(np.float64) * deviation + mean
            measured[name] = np.append(known, np.full(max(0, int(candidates.max(initial=0)) + 1 - len(known)), np.nan))[candidates]
    return measured


def _blank(base: Dataset, ids: pa.Array) -> Catalogue:
    """Lay out items of which nothing is known."""
    manifest, num_items = base.manifest, len(ids)
    columns = {
        "item_index": np.zeros(num_items, np.int32),
        ITEM_ID: ids,
        "title": [""] * num_items,
        "text": [""] * num_items,
        "categories": [[]] * num_items,
        "numbers": [[np.nan] * len(manifest.number_columns)] * num_items,
        "vector": [[0.0] * manifest.vector_size] * num_items,
        "train_count": np.zeros(num_items, np.int64),
    }
    table = pa.table(columns, schema=CATALOGUE_SCHEMA)
    vocabulary = manifest.category_vocabulary
    return Catalogue(table, vocabulary, manifest.number_columns, manifest.number_moments, manifest.vector_size, Counter())


def _same(before: pa.Table, after: pa.Table) -> Any:
    """Return for each row whether only rounding differs."""
    is_same = np.ones(before.num_rows, bool)
    for name in ("title", "text"):
        is_same &= pc.equal(before[name], after[name]).to_numpy()
    for name in ("categories", "numbers", "vector"):
        pairs = zip(before[name].to_pylist(), after[name].to_pylist(), strict=True)
        is_same &= np.array([len(old) == len(new) and np.allclose(old, new, rtol=1e-5, equal_nan=True) for old, new in pairs], bool)
    return is_same
