"""Reads the samples that the plan names, ahead of training and in the plan's order; which ones is decided in `plan.py`."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.config import Config
from recsys.data.batch import Batch, Collator
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan, Indices
from recsys.schema import TRAIN_SCHEMA
from recsys.storage import join

PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class Share:
    """Which part of every step this rank reads."""

    rank: int
    world_size: int
    accumulation_steps: int


class RowGroups:
    """Random access to training rows by row group; keeps the `capacity` row groups that were used last."""

    def __init__(self, dataset: Dataset, capacity: int) -> None:
        self._dataset = dataset
        self._capacity = capacity
        self._address = [(shard.path, group) for shard in dataset.manifest.train_shards for group in range(len(shard.row_groups))]
        self._files: dict[str, pq.ParquetFile] = {}
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, groups: Indices, rows: Indices) -> pa.Table:
        """Return the rows in the order asked for."""
        distinct, inverse = np.unique(groups, return_inverse=True)
        tables = [self._read(int(group)) for group in distinct]
        begins = np.cumsum([0, *(table.num_rows for table in tables[:-1])])
        return pa.concat_tables(tables).take(pa.array(begins[inverse] + rows)) if tables else TRAIN_SCHEMA.empty_table()

    def _read(self, group: int) -> pa.Table:
        if group not in self._tables:
            path, index = self._address[group]
            if path not in self._files:
                filesystem, location = self._dataset.storage.locate(join(self._dataset.uri, path))
                self._files[path] = pq.ParquetFile(location, filesystem=filesystem)
            self._tables[group] = self._files[path].read_row_group(index)
            if len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        return self._tables[group]


class Reader:
    """Gives each step's micro batches of one rank, read and collated on a thread of its own."""

    def __init__(self, dataset: Dataset, catalogue: ItemFeatures, config: Config, share: Share) -> None:
        self._config = config
        self._share = share
        manifest = dataset.manifest
        self._row_group_sizes = tuple(size for shard in manifest.train_shards for size in shard.row_groups)
        self._rows = RowGroups(dataset, capacity=2 * config.training.shuffle_row_groups)
        self._collate = Collator(manifest, takes_whole_catalogue=config.model.loss.kind == "full")
        self._negatives = NegativeSampler(catalogue, config)
        self._is_pinned = config.training.use_gpu and torch.cuda.is_available()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch."""
        training = self._config.training
        return EpochPlan(self._row_group_sizes, training.global_batch_size, training.shuffle_row_groups, training.seed, epoch)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro batches of each step from `first_step` to the epoch's end.

        An error on the reading thread is raised here, at the step that it belongs to.
        """
        plan = self.plan(epoch)
        ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=PREFETCHED_STEPS)
        is_closed = threading.Event()
        thread = threading.Thread(target=self._fill, args=(plan, first_step, ready, is_closed), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            is_closed.set()
            while thread.is_alive():
                with ready.mutex:
                    ready.queue.clear()
                    ready.not_full.notify_all()
                thread.join(timeout=0.05)

    def _fill(
        self, plan: EpochPlan, first_step: int, ready: "queue.Queue[list[Batch] | BaseException | None]", is_closed: threading.Event
    ) -> None:
        try:
            for step in range(first_step, plan.num_steps):
                if is_closed.is_set():
                    return
                ready.put(self._read_step(plan, step))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def _read_step(self, plan: EpochPlan, step: int) -> list[Batch]:
        share = self._share
        num_chunks = share.world_size * share.accumulation_steps
        negatives, log_q = self._negatives.draw(plan.epoch, step)
        batches = []
        for micro_batch in range(share.accumulation_steps):
            ids = plan.chunk_ids(step, micro_batch * share.world_size + share.rank, num_chunks)
            batch = self._collate(self._rows.take(*plan.locate(ids)), ids, negatives, log_q)
            batches.append(batch.pin() if self._is_pinned else batch)
        return batches


class NegativeSampler:
    """Draws each step's negatives, the same on every rank, from the catalogue's items that occur in training."""

    def __init__(self, catalogue: ItemFeatures, config: Config) -> None:
        loss = config.model.loss
        counts = catalogue.train_count.double()
        weights = counts if loss.negatives == "popularity" else (counts > 0).double()
        self._probability = (weights / weights.sum()).numpy()
        self._num = loss.num_negatives if loss.kind == "sampled" else 0
        self._seed = config.training.seed

    def draw(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return catalogue indices (K,) drawn with replacement and the log probability of each."""
        if self._num == 0:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        generator = np.random.default_rng((self._seed, epoch, step, 1))
        indices = generator.choice(len(self._probability), size=self._num, p=self._probability)
        return torch.from_numpy(indices), torch.from_numpy(np.log(self._probability[indices])).float()
