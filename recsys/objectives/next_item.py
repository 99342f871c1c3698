"""The objective of training: the recommender predicts each user's next items and is validated by full ranking."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from recsys.arrays import Integers
from recsys.config import Config
from recsys.data.batch import Batch
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import Ranked, rank_users, score_by, summarise
from recsys.evaluation.slices import MIN_GROUP_USERS
from recsys.evaluation.users import read_evaluation_users
from recsys.model.recommender import RETRIEVAL, build_recommender
from recsys.model.retrieval import GroupBound
from recsys.model.text.catalogue_text import Ranks
from recsys.predictor import Predictor, encode_catalogue


class NextItem:
    """Trains a recommender on the users' sequences; validated by full ranking."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> None:
        self.module = build_recommender(config, dataset, device, ranks)
        self.weights = {RETRIEVAL: 1.0} | {task.name: config.model.ranker.task_weight for task in dataset.manifest.tasks}
        self.bound: GroupBound | None = None
        self._duals: list[float] = []
        self._has_texts = False
        self.metric = config.evaluation.metric
        self._config, self._dataset, self._device, self._ranks = config, dataset, device, ranks
        self._users = read_evaluation_users(dataset, "validation")
        self._group_metrics: list[str] = []
        self._members: dict[str, Integers] = {}  # by the metric's name, places among the validation users as the ranks give them
        share = Share(ranks.rank, ranks.world_size, config.training.accumulation_steps(ranks.world_size))
        reader = Reader(dataset, self.module.catalogue, config, share)
        self.plan, self.steps = reader.plan, reader.steps
        if reader.groups is not None:
            self.bound = self.module.bound = GroupBound(config.fairness, reader.groups)
            self.weights |= dict.fromkeys(self.bound.names, 0.0)
            attribute = config.fairness.attribute
            in_turn = [user for rank in range(ranks.world_size) for user in self._users[rank :: ranks.world_size]]
            groups = np.array([user.attributes.get(attribute) or "" for user in in_turn])
            self._group_metrics = [f"{self.metric} of {attribute} {name}" for name in reader.groups.names]
            members = [(groups == name).nonzero()[0] for name in reader.groups.names]
            self._members = {
                key: places for key, places in zip(self._group_metrics, members, strict=True) if len(places) >= MIN_GROUP_USERS
            }

    def num_tokens(self, batch: Batch) -> int:
        """Count the tokens of the texts that are encoded with a micro batch, each distinct item's once."""
        encoder = self.module.item_encoder
        if encoder.text_encoder is None:
            return 0
        return int(encoder.token_counts[batch.items_on_host].sum())

    def before_step(self, step: int) -> None:
        """Have the kept vectors of texts made anew where that is due, or where the state that was loaded has none."""
        encoder, every = self.module.item_encoder, self._config.model.text.refresh_steps
        if encoder.kept_text is None:
            return
        if step % every == 0 or not (self._has_texts or bool(encoder.kept_text.any())):
            encoder.refresh_texts(self._ranks.rank, self._ranks.world_size)
        self._has_texts = True

    def validate(self) -> dict[str, float]:
        """Rank the validation users over the whole catalogue, each rank its share."""
        module, evaluation = self.module, self._config.evaluation
        rank, world_size = self._ranks.rank, self._ranks.world_size
        item_vectors = encode_catalogue(module.item_encoder, module.catalogue.num_items, self._device)
        predictor = Predictor(self._config, self._dataset.manifest, module.catalogue, module.user_encoder, module.ranker, item_vectors)
        own = self._users[rank::world_size]
        # Under ZeRO-3 a forward is collective, so every rank ranks equally many users, some for nothing.
        missing = -(-len(self._users) // world_size) - len(own)
        ranked = rank_users(score_by(predictor), own + self._users[:missing], evaluation)
        shares: list[Ranked] = [ranked] * world_size
        dist.all_gather_object(shares, ranked.head(len(own)))
        ranked = Ranked.join(shares)
        values = ranking_metrics(ranked.ranks, evaluation.cutoffs)[self.metric]
        groups = {name: float(values[places].mean()) for name, places in self._members.items()}
        return summarise(ranked, evaluation, module.catalogue.num_items) | groups

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Give groups that lie behind by more than the bound more weight from the next epoch on, and others less."""
        if self.bound is not None:
            metric = metrics[self.metric]
            self._duals = self.bound.raised(self._duals, [metrics.get(name, metric) for name in self._group_metrics], metric)
            self.bound.set_duals(self._duals)

    def state(self) -> dict[str, list[float]]:
        """Return the dual variables of the bound on groups, if there is one."""
        return {"duals": self._duals} if self.bound is not None else {}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Restore the dual variables."""
        if self.bound is not None:
            self._duals = state.get("duals", [])
            self.bound.set_duals(self._duals)
