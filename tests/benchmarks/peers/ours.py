"""Our reader; its tensors are complete training batches, with positions among distinct items, gaps, labels and masks."""

from collections.abc import Iterator
from typing import Any

import torch

from recsys.config import load_config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.store import Storage
from tests.benchmarks.peers.serving import Form, Step


class Ours:
    """Its position is the number of steps."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._num_steps = 0
        # Read within the measured time, like the other peers' metadata.
        storage = Storage(options["root"], options["endpoint"] or None)
        self._dataset = Dataset.open(storage, options["dataset"])

    def steps(self, form: Form, is_shuffled: bool, position: Any = None) -> Iterator[Step]:
        reader = self._reader(is_shuffled)
        self._num_steps = position or 0
        if form == "tensors":
            for batches in reader.steps(0, self._num_steps):
                self._num_steps += 1
                yield Step(sum(len(batch.sample_ids) for batch in batches), [])
            return
        for rows in reader.rows(0, self._num_steps):
            self._num_steps += 1
            yield Step(len(rows), rows.scalars["sample_id"].tolist() if form == "ids" else [])

    def position(self) -> int:
        return self._num_steps

    def _reader(self, is_shuffled: bool) -> Reader:
        config = load_config().with_values(
            {
                "run.scratch": self._options["scratch"],
                "training.num_workers": 1,
                "training.global_batch_size": self._options["batch_size"],
                "training.micro_batch_size": self._options["batch_size"],
                "training.shuffle_row_groups": 1 if is_shuffled else 0,
                "training.cache_bytes": 0,
                "model.loss.kind": "sampled",
            }
        )
        return Reader(self._dataset, self._features, config, Share(0, 1, 1))

    @property
    def _features(self) -> ItemFeatures:
        torch.set_num_threads(len(self._options["cores"]))
        return ItemFeatures.read(self._dataset)


open_peer = Ours
