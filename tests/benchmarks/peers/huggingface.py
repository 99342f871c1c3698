"""Hugging Face datasets: streaming Parquet, its shuffle buffer, its state_dict, batches as Arrow tables."""

import os
from collections.abc import Iterator
from typing import Any

from datasets import load_dataset

from tests.benchmarks.peers.delivering import columns_for, deliver
from tests.benchmarks.peers.serving import Form, Step


class HuggingFace:
    """Shuffles shards and a buffer of rows."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._dataset: Any = None
        self._opened: dict[Form, Any] = {}

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        if form not in self._opened:
            self._opened[form] = load_dataset("parquet", streaming=True, split="train", columns=columns_for(form), **self._place())
        dataset = self._opened[form]
        if is_shuffled:
            dataset = dataset.shuffle(seed=0, buffer_size=self._options["buffer_rows"])
        self._dataset = dataset.with_format("arrow")
        if position is not None:
            self._dataset.load_state_dict(position)
        for table in self._dataset.iter(self._options["batch_size"]):
            yield deliver(table, form)

    def position(self) -> Any:
        return self._dataset.state_dict()

    def _place(self) -> dict[str, Any]:
        if not self._options["endpoint"]:
            return {"data_files": self._options["files"]}
        keys = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}
        files = ["s3://" + path for path in self._options["files"]]
        return {"data_files": files, "storage_options": {**keys, "client_kwargs": {"endpoint_url": self._options["endpoint"]}}}


open_peer = HuggingFace
