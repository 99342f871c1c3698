"""The upper limit: pyarrow reads the same columns by row group, in file order, without shuffling."""

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from pyarrow import fs

from tests.benchmarks.peers.delivering import columns_for, deliver
from tests.benchmarks.peers.serving import Form, Step


class ArrowScan:
    """Reads one row group per step."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._files = options["files"]
        self._filesystem = filesystem_of(options)

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        for path in self._files:
            file = pq.ParquetFile(path, filesystem=self._filesystem)
            for group in range(file.num_row_groups):
                yield deliver(file.read_row_group(group, columns=columns_for(form), use_threads=len(os.sched_getaffinity(0)) > 1), form)

    def position(self) -> None:
        return None


def filesystem_of(options: dict[str, Any]) -> fs.FileSystem:
    if not options["endpoint"]:
        return fs.LocalFileSystem()
    address = urlsplit(options["endpoint"])
    return fs.S3FileSystem(region="us-east-1", scheme=address.scheme, endpoint_override=address.netloc)


open_peer = ArrowScan
