"""Reads the samples of the plan, in its order and ahead of training."""

import itertools
import math
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recsys.arrays import Integers
from recsys.config import Config
from recsys.data.batch import PADDING_SAMPLE, Batch, Collator, group_cost, has_profiles
from recsys.data.draws import AloneDraws, NegativeSampler
from recsys.data.items import ItemFeatures
from recsys.data.labels.training import UserGroups, negative_rates
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.data.node_files import DiskCache
from recsys.data.plan import EpochPlan
from recsys.data.sequences import Sequences
from recsys.data.shards import RowGroupSource, WindowLoader
from recsys.data.text.queries import QueryDraws
from recsys.schema import CONTEXTS, EXPOSURE_COLUMNS, PROFILE_COLUMNS

PREFETCHED_STEPS = 4
_SPAN_ROWS = 8192
_FETCHING_THREADS = 8


@dataclass(frozen=True)
class Share:
    """The part of every step that this rank reads."""

    rank: int
    world_size: int
    accumulation_steps: int


class Reader:
    """Yields one rank's micro batches of each step, read and collated on background threads.

    The order is the plan's: a run resumes at any (epoch, step), with any number of ranks, without reading earlier samples. A shard that
    differs from the manifest raises an error.
    """

    def __init__(self, dataset: Dataset, catalogue: ItemFeatures, config: Config, share: Share) -> None:
        self._config = config
        self._share = share
        self._num_streams = dataset.manifest.num_streams
        shards = dataset.manifest.train_shards
        self._row_group_sizes = tuple(size for shard in shards for size in shard.row_groups)
        self._first_new = sum(len(shard.row_groups) for shard in shards if shard.dataset)  # of this version, which are the last ones
        is_remote = dataset.storage.is_remote(dataset.uri)
        is_cached = is_remote and config.training.cache_bytes > 0
        cache = DiskCache(Path(config.run.scratch) / "cache", config.training.cache_bytes) if is_cached else None
        self._num_threads = _FETCHING_THREADS if is_remote else min(_FETCHING_THREADS, _num_cores())
        self._source = RowGroupSource(dataset, wanted_columns(config, dataset.manifest), cache)
        ranker = config.model.ranker
        rates = negative_rates(dataset, ranker) if ranker.imbalance == "sample" else None
        attribute = config.fairness.attribute
        self.groups = UserGroups.read(dataset, attribute) if attribute else None
        queries: QueryDraws | None = None
        if config.model.has_queries:
            has_exposures = dataset.manifest.has_exposures
            target_kinds = dataset.manifest.target_kinds
            queries = QueryDraws(config.model.query_rate, config.training.seed, catalogue.has_text, target_kinds, has_exposures)
        self._collate = Collator(
            dataset.manifest,
            config.model.loss.kind == "full",
            group_cost(config.training.use_gpu),
            self.groups,
            rates,
            queries,
            config.training.seed if config.training.shuffle_histories else None,
            config.model.caches_texts,
            config.data.max_history,
            config.data.window_stride,
            AloneDraws(config.model.profile_rate, config.training.seed) if has_profiles(config.model, dataset.manifest) else None,
        )
        self._negatives = NegativeSampler(catalogue, config)
        self._is_pinned = config.training.use_gpu and torch.cuda.is_available()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch."""
        training = self._config.training
        return EpochPlan(
            self._row_group_sizes,
            training.global_batch_size,
            self._num_streams,
            training.shuffle_row_groups,
            training.seed,
            epoch,
            self._first_new,
            training.replay,
        )

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro batches of each step from `first_step` on. Another thread builds them; its errors are raised at their step."""
        last_step, rows = self.plan(epoch).num_steps, self.rows(epoch, first_step)

        def read(step: int) -> list[Batch]:
            return self._collate_step(next(rows), *self._negatives.draw(epoch, step), epoch)

        with closing(rows), ThreadPoolExecutor(1, thread_name_prefix="collate") as thread:
            ahead = deque(thread.submit(read, step) for step in range(first_step, min(first_step + PREFETCHED_STEPS, last_step)))
            try:
                for step in range(first_step + PREFETCHED_STEPS, last_step + PREFETCHED_STEPS):
                    batches = ahead.popleft().result()
                    if step < last_step:
                        ahead.append(thread.submit(read, step))
                    yield batches
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    def rows(self, epoch: int, first_step: int = 0) -> Generator[Sequences, None, None]:
        """Yield this rank's uncollated rows of each step; other threads read and decode them ahead."""
        plan, share = self.plan(epoch), self._share
        begin = first_step * plan.global_batch_size
        touching = begin + (share.rank - begin) % share.world_size + share.world_size * np.arange(plan.num_streams)
        loader = WindowLoader(plan, self._source, touching, self._config.training.prefetch_bytes, self._num_threads)
        last = first_step
        try:
            while (first := last) < plan.num_steps:
                last = _span_end(plan, first, share.world_size)
                numbers = plan.numbers(first, last, share.rank, share.world_size)
                rows = _gather(loader, numbers, plan.num_streams, share.world_size)
                bounds = np.searchsorted(numbers, np.arange(first, last + 1) * plan.global_batch_size)
                for start, stop in itertools.pairwise(bounds.tolist()):
                    yield rows[start:stop]
        finally:
            loader.close()

    def _collate_step(self, rows: Sequences, negatives: torch.Tensor, log_q: torch.Tensor, epoch: int) -> list[Batch]:
        num_micro_batches = self._share.accumulation_steps
        batches = [self._collate(rows[number::num_micro_batches], negatives, log_q, epoch) for number in range(num_micro_batches)]
        return [batch.pin() for batch in batches] if self._is_pinned else batches


def wanted_columns(config: Config, manifest: DatasetManifest) -> tuple[str, ...]:
    """Return the columns of the training shards that a batch needs; the others are not fetched."""
    is_wanted = {
        "items": True,
        "events": len(manifest.event_kinds) > 1 or len(manifest.kinds) > 1,
        "timestamps": manifest.has_time and config.model.use_gaps,
        "values": manifest.has_values,
        "queries": config.model.has_queries and manifest.num_queries > 0,
        "first_target": True,
        CONTEXTS: config.model.use_contexts and bool(manifest.contexts),
        **dict.fromkeys(PROFILE_COLUMNS, has_profiles(config.model, manifest)),
        **dict.fromkeys(EXPOSURE_COLUMNS, manifest.has_exposures),
    }
    return tuple(name for name, wanted in is_wanted.items() if wanted)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _span_end(plan: EpochPlan, step: int, world_size: int) -> int:
    """Return the end of the steps whose rows are gathered at once; more rows at once mean less work per step.

    Without shuffling the steps end with a window, so that rows that are consecutive on disk are not rearranged.
    """
    num_steps = max(1, _SPAN_ROWS * world_size // plan.global_batch_size)
    if plan.num_streams == 1:
        window = plan.windows(0)[plan.window_at(0, step * plan.global_batch_size)]
        num_steps = max(1, window.end // plan.global_batch_size - step)
    return min(step + num_steps, plan.num_steps)


def _gather(loader: WindowLoader, numbers: Integers, num_streams: int, world_size: int) -> Sequences:
    """Return the rows of consecutive samples of a rank, in order.

    Their numbers increase by `world_size`, so they cycle through the rank's streams with a fixed period, and every cycle advances each
    stream by the same number of places.
    """
    if not len(numbers):
        return PADDING_SAMPLE[:0]
    common = math.gcd(num_streams, world_size)
    period, stride = num_streams // common, world_size // common
    rounds, turns = np.divmod(np.arange(len(numbers)), period)
    first = numbers[:period]
    extents = (np.bincount(turns) - 1) * stride + 1
    spans = zip((first % num_streams).tolist(), (first // num_streams).tolist(), extents.tolist(), strict=True)
    rows = Sequences.join([part for stream, start, extent in spans for part in loader.take(stream, start, start + extent)])
    return rows[(np.cumsum(extents) - extents)[turns] + rounds * stride]
