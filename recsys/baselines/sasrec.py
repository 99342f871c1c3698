"""SASRec (Kang and McAuley 2018): the recommender with only ids, trained in one process."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, ValidationRanking, keep_best_epoch
from recsys.baselines.training_data import TrainingData, join_histories
from recsys.config import Config
from recsys.data.batch import group_cost, map_tensors, pack
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.data.sequences import Sequences
from recsys.model.item_encoder import ItemText
from recsys.model.recommender import RETRIEVAL, Recommender
from recsys.model.retrieval import RetrievalScores

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
"""Settings that turn the configured model into SASRec; width, depth, dropout and loss stay as configured."""


@dataclasses.dataclass(frozen=True)
class SequentialRanking(Baseline):
    """Ranks by the state after the last item of the history."""

    model: Recommender
    max_history: int
    device: torch.device
    has_start: bool

    @torch.no_grad()
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        flat, offsets = join_histories(histories, self.max_history)
        lengths = np.diff(offsets)
        cost = group_cost(self.device.type == "cuda")
        packed, first_places = pack(Sequences.of_offsets({"items": flat}, offsets), cost, has_start=self.has_start)
        packed = map_tensors(packed, lambda tensor: tensor.to(self.device))
        items = self.model.item_encoder()
        states = self.model.user_encoder(F.embedding(packed.items, items), packed)
        last = torch.from_numpy(first_places + np.maximum(lengths, 1 - self.has_start) - 1).to(self.device)
        scores: Scores = RetrievalScores(items)(states[last]).float().cpu().numpy()
        return scores


def fit_sasrec(data: TrainingData, config: Config) -> Baseline:
    """Train with AdamW and the run's learning rate, warm-up, cosine decay and batch size; the validation targets choose the epoch."""
    training, optimizer_config = config.training, config.optimizer
    workers = {"training.num_workers": 1, "training.micro_batch_size": training.global_batch_size}
    epochs, manifest = config.evaluation.baseline_epochs, data.dataset.manifest
    only_items = manifest.model_copy(update={"event_kinds": manifest.event_kinds[:1], "tasks": ()})
    only_ids, dataset = config.with_values(ONLY_IDS | workers), Dataset(data.dataset.storage, data.dataset.uri, only_items)
    device = torch.device("cuda" if training.use_gpu and torch.cuda.is_available() else "cpu")
    model = Recommender(only_ids, dataset, data.catalogue, ItemText()).to(device)
    reader = Reader(dataset, data.catalogue, only_ids, Share(rank=0, world_size=1, accumulation_steps=1))
    rate, betas = optimizer_config.learning_rate, (optimizer_config.beta1, optimizer_config.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=optimizer_config.weight_decay)
    total_steps = max(4, epochs * reader.plan(0).num_steps)  # the schedule needs a step on either side of its peak
    warmup = min(0.5, max(1, optimizer_config.warmup_steps) / total_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps, pct_start=warmup, cycle_momentum=False)

    def train(epoch: int) -> None:
        for (batch,) in reader.steps(epoch):
            optimizer.zero_grad()
            (model(batch.to(device))[RETRIEVAL] / max(1, len(batch.targets))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
            optimizer.step()
            schedule.step()

    ranking, quality = SequentialRanking(model, config.data.max_history, device, manifest.has_exposures), ValidationRanking(data)
    keep_best_epoch(model, epochs, train, lambda: quality(ranking))
    return ranking
