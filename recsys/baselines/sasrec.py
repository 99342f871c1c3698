"""SASRec (Kang and McAuley 2018): the recommender over ids alone, trained in one process."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline
from recsys.baselines.fitting import ValidationRanking, keep_best_epoch
from recsys.baselines.interactions import TrainingData
from recsys.config import Config
from recsys.data.batch import group_cost, map_tensors, pack
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.data.sequences import Sequences
from recsys.model.item_encoder import ItemText
from recsys.model.recommender import RETRIEVAL, Recommender
from recsys.model.scoring import RetrievalScores

ONLY_IDS = {
    "model.text.mode": "off",
    "model.use_ids": True,
    "model.id_buckets": 0,
    "model.id_dropout": 0.0,
    "model.use_features": False,
    "model.use_gaps": False,
    "model.use_values": False,
    "model.query_rate": 0.0,
    "model.attention": "softmax",
    "model.positions": "learned",
    "model.ranker": {},
    "fairness": {},
}
"""What makes a configured model SASRec; width, depth, dropout and loss stay what they are."""


@dataclasses.dataclass(frozen=True)
class SequentialRanking(Baseline):
    """Ranks by the state after the last item of the history."""

    model: Recommender
    max_history: int
    device: torch.device

    @torch.no_grad()
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        recent = [history[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in recent])
        sequences = Sequences.of_offsets({"items": np.concatenate([np.zeros(0, np.int64), *recent])}, np.cumsum([0, *lengths]))
        packed, first_places = pack(sequences, group_cost(self.device.type == "cuda"))
        packed = map_tensors(packed, lambda tensor: tensor.to(self.device))
        items = self.model.item_encoder()
        states = self.model.user_encoder(F.embedding(packed.items, items), packed)
        last = torch.from_numpy(first_places + np.maximum(lengths, 1) - 1).to(self.device)
        scores: Scores = RetrievalScores(items)(states[last]).float().cpu().numpy()
        return scores


def fit_sasrec(data: TrainingData, config: Config) -> Baseline:
    """Train by AdamW with the run's own rate, warm-up, cosine decay and batches; the validation targets choose the epoch."""
    training, optimizer_config = config.training, config.optimizer
    workers = {"training.num_workers": 1, "training.micro_batch_size": training.global_batch_size}
    epochs = config.evaluation.baseline_epochs
    only_ids, dataset = config.with_values(ONLY_IDS | workers), _without_labels(data.dataset)
    device = torch.device("cuda" if training.use_gpu and torch.cuda.is_available() else "cpu")
    model = Recommender(only_ids, dataset, data.catalogue, ItemText()).to(device)
    reader = Reader(dataset, data.catalogue, only_ids, Share(rank=0, world_size=1, accumulation_steps=1))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        optimizer_config.learning_rate,
        (optimizer_config.beta1, optimizer_config.beta2),
        weight_decay=optimizer_config.weight_decay,
    )
    total_steps = epochs * reader.plan(0).num_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        optimizer_config.learning_rate,
        total_steps,
        pct_start=min(0.5, max(1, optimizer_config.warmup_steps) / total_steps),
        cycle_momentum=False,
    )

    def train(epoch: int) -> None:
        for (batch,) in reader.steps(epoch):
            optimizer.zero_grad()
            (model(batch.to(device))[RETRIEVAL] / max(1, len(batch.targets))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
            optimizer.step()
            schedule.step()

    ranking, quality = SequentialRanking(model, config.data.max_history, device), ValidationRanking(data)
    keep_best_epoch(model, epochs, train, lambda: quality(ranking))
    return ranking


def _without_labels(dataset: Dataset) -> Dataset:
    """View a dataset as one of bare items, whatever else its interactions have."""
    bare = dataset.manifest.model_copy(update={"event_kinds": dataset.manifest.event_kinds[:1], "tasks": ()})
    return Dataset(dataset.storage, dataset.uri, bare)
