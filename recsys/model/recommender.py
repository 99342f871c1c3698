"""The trained module: item encoder, user encoder, ranker, and the losses of a batch."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.draws import negative_items
from recsys.data.items import ItemFeatures
from recsys.data.labels.training import display_shares, negative_rates
from recsys.data.manifest import Dataset
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.ranker import Ranker, TaskLosses, build_regression
from recsys.model.retrieval import GroupBound, Loss, full_softmax, gather_from_ranks, gbce, sampled_softmax
from recsys.model.text.backbones import load_backbone
from recsys.model.text.catalogue_text import SINGLE_PROCESS, Ranks, frozen_vectors, text_tokens
from recsys.model.text.encoder import TextEncoder, locate_backbone
from recsys.model.text.queries import TrainingQueries, read_training_queries
from recsys.model.user_encoder import UserEncoder

RETRIEVAL = "retrieval"


class Recommender(nn.Module):
    """The trained module, from a batch to losses by name. Shapes: P places of histories, D distinct items, N targets, W width."""

    candidates: Tensor  # catalogue indices of the items that targets are compared with

    def __init__(
        self, config: Config, dataset: Dataset, catalogue: ItemFeatures, text: ItemText, queries: TrainingQueries | None = None
    ) -> None:
        super().__init__()
        manifest = dataset.manifest
        self.catalogue = catalogue
        self.loss = config.model.loss
        self.bound: GroupBound | None = None
        self.register_buffer("candidates", negative_items(catalogue, config.model), persistent=False)
        self.num_interactions = int(catalogue.train_count.sum())
        self.item_encoder = ItemEncoder(config.model, catalogue, text)
        self.queries = queries
        self.user_encoder = UserEncoder(config, manifest)
        rates = negative_rates(dataset, config.model.ranker)
        regression = build_regression(config.model, manifest)
        displays = display_shares(dataset)
        self.ranker = Ranker(config.model, manifest.tasks, "text" in self.item_encoder.sources, rates, regression, displays)
        self.task_losses = TaskLosses(config.model.ranker, manifest.tasks, rates)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of each loss over the batch's targets, by name."""
        indices = None if self.loss.kind == "full" else batch.items
        items, texts = self.item_encoder.with_text(indices, torch.from_numpy(batch.items_on_host))  # (D, W)
        asked = None
        if self.queries is not None and batch.query_texts is not None:
            asked = self.queries(self.item_encoder, batch.query_texts)  # (Q, W)
        vectors = F.embedding(batch.histories.items, items)  # (P, W)
        states = self.user_encoder(vectors, batch.histories, asked)  # (P, W)
        places, pairs = torch.cat([batch.target_places, batch.exposure_places]), torch.cat([batch.targets, batch.exposures])  # (N + E,)
        users, paired = self.user_encoder.ask(F.embedding(places, states), batch.contexts), F.embedding(pairs, items)  # (N + E, W)
        ranked_users = self.ranker.read_users(users, vectors, batch.histories, places)
        scores = self.ranker(ranked_users, paired, None if texts is None else F.embedding(pairs, texts))
        scores = self.ranker.add_display_bias(scores, batch.displays)
        result: dict[str, Tensor] = self.task_losses(scores, batch.labels, batch.label_mask)
        users, positives = users[: len(batch.targets)], paired[: len(batch.targets)]  # (N, W)
        weights = batch.target_weights if self.bound is None else batch.target_weights * self.bound.weights(batch.group_mask)
        loss, each = self._retrieval_loss(batch, users / self.loss.temperature, positives, items, weights)
        groups = {} if self.bound is None else dict(zip(self.bound.names, each @ batch.group_mask, strict=True))
        return result | groups | {RETRIEVAL: loss}

    def _retrieval_loss(self, batch: Batch, users: Tensor, positives: Tensor, items: Tensor, weights: Tensor) -> Loss:
        loss = self.loss
        if loss.kind == "full":
            return full_softmax(users, positives, F.embedding(self.candidates, items), weights, loss.chunk_bytes)
        target_ids = batch.items[batch.targets]
        if loss.draws_negatives:
            negatives, negative_ids, log_q = F.embedding(batch.negatives, items), batch.items[batch.negatives], batch.negatives_log_q
        else:
            negatives, negative_ids = gather_from_ranks(positives), gather_from_ranks(target_ids)
            log_q = (self.item_encoder.train_count[negative_ids] / self.num_interactions).log()
        if loss.kind == "gbce":
            count, calibration = len(self.candidates), loss.calibration
            return gbce(users, positives, target_ids, negatives, negative_ids, count, calibration, weights, loss.chunk_bytes)
        if loss.kind == "infonce":
            log_q = torch.full_like(log_q, -math.log(max(1, len(negatives))))
        return sampled_softmax(users, positives, target_ids, negatives, negative_ids, log_q, weights, loss.chunk_bytes)


def _read_item_text(config: Config, dataset: Dataset, catalogue: ItemFeatures, device: torch.device, ranks: Ranks) -> ItemText:
    """Read or compute the item encoder's text inputs. All of `ranks` must call this."""
    text, scratch = config.model.text, Path(config.run.scratch)
    if text.mode == "off" or not bool(catalogue.has_text.any()):
        return ItemText()
    folder = locate_backbone(text, dataset, scratch)
    if text.mode == "frozen":
        return ItemText(vectors=frozen_vectors(folder, text, catalogue.texts, dataset, scratch, device, ranks))
    tokens, lengths = text_tokens(folder, text, catalogue.texts, dataset, scratch)
    return ItemText(tokens=tokens, lengths=lengths, encoder=TextEncoder(load_backbone(folder, text), text.pooling))


def build_recommender(config: Config, dataset: Dataset, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> Recommender:
    """Build the recommender, with initial weights that depend only on the seed. All of `ranks` must call this to share the encoding.

    The catalogue is memory-mapped from files below `run.scratch`, so the processes of a node share one copy.
    """
    catalogue = ItemFeatures.read(dataset, Path(config.run.scratch))
    torch.manual_seed(config.training.seed)  # for LoRA adapters
    text = _read_item_text(config, dataset, catalogue, device, ranks)
    queries = read_training_queries(config, dataset, catalogue, device, ranks)
    torch.manual_seed(config.training.seed)  # again: computing frozen vectors may have drawn random numbers
    return Recommender(config, dataset, catalogue, text, queries)
