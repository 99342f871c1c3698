"""A typical DataLoader over an IterableDataset: shuffled row groups, and a window of rows shuffled in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, IterableDataset

from tests.benchmarks.peers.arrow_scan import filesystem_of
from tests.benchmarks.peers.delivering import as_step, columns_for, make
from tests.benchmarks.peers.serving import Form, Step


class Windows(IterableDataset[Any]):
    """Reads row groups into a window, shuffles it, and yields batches."""

    def __init__(self, options: dict[str, Any], form: Form, is_shuffled: bool) -> None:
        self._options = options
        self._form: Form = form
        self._is_shuffled = is_shuffled

    def __iter__(self) -> Iterator[Any]:
        batch_size = self._options["batch_size"]
        rest: list[pa.Table] = []
        for table in self._windows(np.random.default_rng(0)):
            whole = pa.concat_tables([*rest, table]).combine_chunks()
            end = len(whole) // batch_size * batch_size
            for start in range(0, end, batch_size):
                yield make(whole.slice(start, batch_size), self._form)
            rest = [whole.slice(end)]
        if len(rest[0]):
            yield make(rest[0], self._form)

    def _windows(self, generator: np.random.Generator) -> Iterator[pa.Table]:
        waiting: list[pa.Table] = []
        for table in self._row_groups(generator):
            waiting.append(table)
            if sum(map(len, waiting)) >= self._options["buffer_rows"]:
                yield self._shuffled(waiting, generator)
                waiting = []
        if waiting:
            yield self._shuffled(waiting, generator)

    def _shuffled(self, tables: list[pa.Table], generator: np.random.Generator) -> pa.Table:
        table = pa.concat_tables(tables)
        return table.take(pa.array(generator.permutation(len(table)))) if self._is_shuffled else table

    def _row_groups(self, generator: np.random.Generator) -> Iterator[pa.Table]:
        files = [pq.ParquetFile(path, filesystem=filesystem_of(self._options)) for path in self._options["files"]]
        places = [(file, group) for file in files for group in range(file.num_row_groups)]
        for number in generator.permutation(len(places)) if self._is_shuffled else range(len(places)):
            file, group = places[number]
            yield file.read_row_group(group, columns=columns_for(self._form), use_threads=False)


class TorchLoader:
    """Uses a worker process on two cores (task "serve" only); it persists between epochs, so its start is not measured."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._num_workers = len(options["cores"]) - 1 if options["task"] == "serve" else 0
        self._loaders: dict[tuple[Form, bool], DataLoader[Any]] = {}

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        key = (form, is_shuffled)
        if key not in self._loaders:
            windows = Windows(self._options, form, is_shuffled)
            start_method = "spawn" if self._num_workers else None
            self._loaders[key] = DataLoader(
                windows,
                batch_size=None,
                num_workers=self._num_workers,
                multiprocessing_context=start_method,
                persistent_workers=self._num_workers > 0,
            )
        for made in self._loaders[key]:
            yield as_step(made, form)

    def position(self) -> None:
        return None


open_peer = TorchLoader
