"""The recommender as what the loop trains: its module, its samples, and its rank of the validation users' items."""

import torch
import torch.distributed as dist

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.evaluation.ranking import Ranked, rank_users, score_by, summarise
from recsys.evaluation.users import read_evaluation_users
from recsys.model.catalogue_text import Ranks
from recsys.model.recommender import RETRIEVAL, build_recommender
from recsys.predictor import Predictor, encode_catalogue


class Recommending:
    """Trains a recommender on the users' sequences; validated by full ranking."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> None:
        self.module = build_recommender(config, dataset, device, ranks)
        self.weights = {RETRIEVAL: 1.0} | {task.name: config.model.ranker.task_weight for task in dataset.manifest.tasks}
        self.metric = config.evaluation.metric
        self._config, self._dataset, self._device, self._ranks = config, dataset, device, ranks
        reader = Reader(dataset, self.module.catalogue, config, Share(ranks.rank, ranks.world_size, config.training.accumulation_steps))
        self.plan, self.steps = reader.plan, reader.steps
        self._users = read_evaluation_users(dataset, "validation")

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
        return summarise(Ranked.join(shares), evaluation, module.catalogue.num_items)
