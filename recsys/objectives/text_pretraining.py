"""The pretraining objective: the language model is trained on the catalogue's texts and validated on held-out texts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recsys.config import Config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan
from recsys.data.text.cooccurrence import Cooccurrences
from recsys.data.text.corpus import VALIDATION, MaskedTokens, Pairs, TextBatch, TextCollator, TextSplit
from recsys.model.retrieval import gather_from_ranks
from recsys.model.text.catalogue_text import Ranks, text_tokens
from recsys.model.text.encoder import locate_backbone
from recsys.model.text.pretraining import CONTRASTIVE, MASKED, Pretrainer, build_pretrainer, pair_scores
from recsys.objectives.objective import Objective
from recsys.schema import PADDING_ITEM

GROUP_ITEMS = 256
"""Number of texts that the epoch plan treats as a row group; the texts are in memory."""

PAIR_AUC = "pair_auc"
"""Mean share of other candidates that are less similar to a text than its paired text; with few pairs less noisy than recall@1."""


class TextPretraining(Objective):
    """Trains all weights of the language model, for any `model.text.mode`, on each text of the catalogue once per epoch."""

    module: Pretrainer

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> None:
        settings, text, scratch = config.pretraining, config.model.text, Path(config.run.scratch)
        catalogue = ItemFeatures.read(dataset, scratch)
        folder = locate_backbone(text, dataset, scratch)
        self.module, masking = build_pretrainer(config, folder)
        self.weights = {name: 1.0 for name in (MASKED, CONTRASTIVE) if name in settings.objectives}
        self.metric = PAIR_AUC if CONTRASTIVE in settings.objectives else "masked_accuracy"
        self._config, self._device, self._ranks, self._num_streams = config, device, ranks, dataset.manifest.num_streams
        self._split = TextSplit.read(dataset, catalogue, scratch)
        self._collate = TextCollator(
            *text_tokens(folder, text, catalogue.texts, dataset, scratch),
            split=self._split,
            masking=masking,
            partners=Cooccurrences.read(dataset, catalogue, settings.window, scratch) if CONTRASTIVE in settings.objectives else None,
            seed=config.training.seed,
        )

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's samples."""
        training, num_items = self._config.training, len(self._split.trained)
        groups = (*[GROUP_ITEMS] * (num_items // GROUP_ITEMS), num_items % GROUP_ITEMS)
        return EpochPlan(groups, training.global_batch_size, self._num_streams, training.shuffle_row_groups, training.seed, epoch)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[TextBatch]]:
        """Yield this rank's micro batches of each step from `first_step` to the epoch's end."""
        plan, num_micro_batches = self.plan(epoch), self._config.training.accumulation_steps(self._ranks.world_size)
        for step in range(first_step, plan.num_steps):
            items = self._split.trained[plan.step_ids(step, self._ranks.rank, self._ranks.world_size)].astype(np.int64)
            yield [self._collate(items[number::num_micro_batches], epoch) for number in range(num_micro_batches)]

    def num_tokens(self, batch: TextBatch) -> int:
        """Return the number of real tokens of a micro batch."""
        return sum(int(part.lengths.sum()) for part in (batch.masked, batch.pairs) if part is not None)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the metrics on held-out texts: predicting masked tokens, and ranking each item's paired item among all paired items."""
        rank, world_size, size = self._ranks.rank, self._ranks.world_size, self._config.training.micro_batch_size
        own = self._split.held_out[rank::world_size]
        longest = -(-len(self._split.held_out) // world_size)
        # A ZeRO-3 forward is collective, so every rank has the same number of batches; some may be empty.
        batches = [self._collate(own[begin : begin + size], VALIDATION).to(self._device) for begin in range(0, longest, size)]
        metrics: dict[str, float] = {}
        if MASKED in self.weights:
            judged = (self._judge_tokens(batch.masked) for batch in batches if batch.masked)
            metrics |= self._means(("masked_loss", "masked_accuracy"), judged)
        if CONTRASTIVE in self.weights:
            pairs = [batch.pairs for batch in batches if batch.pairs]
            metrics |= self._means(("contrastive_loss", "recall@1", PAIR_AUC), self._judge_pairs(pairs))
        return metrics

    def _judge_tokens(self, masked: MaskedTokens) -> tuple[Tensor | int, ...]:
        """Return the summed loss, the number of correct predictions and the number of predictions."""
        scores, right = self.module.predict(masked)
        return F.cross_entropy(scores, right, reduction="sum"), (scores.argmax(1) == right).sum(), len(right)

    def _judge_pairs(self, batches: list[Pairs]) -> Iterator[tuple[Tensor | int, ...]]:
        """Yield per batch the summed loss, the number of pairs ranked first, the summed share of less similar candidates, and the count.

        The candidates are the paired items of all ranks.
        """
        vectors = [self.module.encode(pairs) for pairs in batches]
        candidates = gather_from_ranks(torch.cat([partners for _, partners in vectors]))
        candidate_ids = gather_from_ranks(torch.cat([pairs.partners for pairs in batches]))
        for pairs, (items, partners) in zip(batches, vectors, strict=True):
            scores = pair_scores(items, partners, candidates, candidate_ids, pairs)[pairs.partners != PADDING_ITEM]
            own, others = scores[:, :1], scores[:, 1:]
            num_less = ((others < own) & others.isfinite()).sum(1)
            shares = num_less / others.isfinite().sum(1).clamp(min=1)
            scaled = scores / self._config.pretraining.temperature
            yield (scaled.logsumexp(1) - scaled[:, 0]).sum(), (others < own).all(1).sum(), shares.sum(), len(scores)

    def _means(self, names: tuple[str, ...], sums: Iterable[tuple[Tensor | int, ...]]) -> dict[str, float]:
        """Divide sums over all batches and ranks by their count, the last entry. Every rank must call this."""
        totals = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)
        for part in sums:
            totals += torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self._device) for value in part])
        dist.all_reduce(totals)
        *values, count = totals.tolist()
        return {name: value / max(1, count) for name, value in zip(names, values, strict=True)}
