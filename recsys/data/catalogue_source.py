"""A catalogue read part by part, so that it need not fit in memory; what is made of the parts is `item_features.py`'s."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.manifest import Dataset, Shard, last_rows

PART_ROWS = 16_384
ITEM_INDEX = "item_index"

ReadColumns = Callable[[Sequence[str]], Iterator[pa.Table]]
"""Some columns of CATALOGUE_SCHEMA in parts of at most PART_ROWS rows; reads anew with each call."""


@dataclass(frozen=True)
class CatalogueSource:
    """The first version's rows in the order of `item_index`, those of later versions, and counts (`item_index`, `count`) to be added."""

    first: ReadColumns
    later: ReadColumns
    added_counts: Callable[[], Iterator[pa.Table]]

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "CatalogueSource":
        """Read a dataset's shards from the store."""
        shards = dataset.manifest.catalogue_shards
        oldest = [shard for shard in shards if shard.dataset == shards[0].dataset]
        return cls(
            first=partial(_read_shards, dataset, oldest),
            later=partial(_read_shards, dataset, shards[len(oldest) :]),
            added_counts=lambda: map(dataset.read_shard, dataset.manifest.count_shards),
        )

    @classmethod
    def of_file(cls, path: Path) -> "CatalogueSource":
        """Read a Parquet file with a whole catalogue."""
        return cls(lambda columns: _read_file(pq.ParquetFile(path), columns), _nothing, lambda: iter(()))

    @classmethod
    def of_table(cls, table: pa.Table) -> "CatalogueSource":
        """Read a table with a whole catalogue."""

        def parts(columns: Sequence[str]) -> Iterator[pa.Table]:
            return (table.select(columns).slice(begin, PART_ROWS) for begin in range(0, table.num_rows, PART_ROWS))

        return cls(parts, _nothing, lambda: iter(()))

    def rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Give `item_index` and some columns of all versions, oldest first: the last row of an index counts."""
        yield from self.first([ITEM_INDEX, *columns])
        yield from self.later([ITEM_INDEX, *columns])

    def sorted_rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Give `item_index` and some columns, one row per item in the order of the index; later versions' rows are held in memory."""
        with_index = [ITEM_INDEX, *columns]
        later = list(self.later(with_index))
        if not later:
            yield from self.first(with_index)
            return
        newest = last_rows(pa.concat_tables(later), ITEM_INDEX)
        indices, begin = newest[ITEM_INDEX].to_numpy(), 0
        for part in self.first(with_index):
            end = int(np.searchsorted(indices, part[ITEM_INDEX][-1].as_py(), side="right"))
            yield last_rows(pa.concat_tables([part, newest.slice(begin, end - begin)]), ITEM_INDEX)
            begin = end
        yield newest.slice(begin)

    def widths(self, columns: Sequence[str]) -> dict[str, int]:
        """Measure the longest list of each list column."""
        widths = dict.fromkeys(columns, 0)
        for part in self.rows(columns):
            for name in columns:
                widths[name] = max(widths[name], pc.max(pc.list_value_length(part[name])).as_py() or 0)
        return widths


def _read_shards(dataset: Dataset, shards: Sequence[Shard], columns: Sequence[str]) -> Iterator[pa.Table]:
    for shard in shards:
        filesystem, path = dataset.storage.locate(dataset.address(shard))
        yield from _read_file(pq.ParquetFile(path, filesystem=filesystem), columns)


def _read_file(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read some row groups after others: pyarrow would fetch all that it is asked for at once."""
    with file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        part_of = (np.cumsum([0, *rows[:-1]]) // PART_ROWS).tolist() if rows else []
        for _, groups in groupby(range(file.num_row_groups), key=part_of.__getitem__):
            for batch in file.iter_batches(PART_ROWS, row_groups=list(groups), columns=list(columns)):
                yield pa.Table.from_batches([batch])


def _nothing(_: Sequence[str]) -> Iterator[pa.Table]:
    return iter(())
