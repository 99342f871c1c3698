"""The next-item objective: the recommender predicts each user's next items and is validated by full ranking."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from recsys.arrays import Floats
from recsys.config import Config
from recsys.config.evaluation import EvaluationConfig
from recsys.data.batch import Batch
from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan
from recsys.data.reader import Reader, Share
from recsys.evaluation.exposures import ExposedTargets
from recsys.evaluation.measures import Measures, deciding_vectors
from recsys.evaluation.ranking import Ranked, lists_by, rank_users
from recsys.evaluation.slices import MIN_GROUP_USERS
from recsys.evaluation.tasks import Predictions, predict_all, predict_by
from recsys.evaluation.users import EvaluationUser, read_evaluation_users
from recsys.model.recommender import RETRIEVAL, Recommender, build_recommender
from recsys.model.retrieval import GroupBound
from recsys.model.text.catalogue_text import Ranks
from recsys.objectives.objective import Objective
from recsys.predictor import PAIRS_AT_ONCE, Predictor, encode_catalogue


class NextItem(Objective):
    """Trains a recommender on user histories; validated by full ranking."""

    module: Recommender

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, ranks: Ranks) -> None:
        self.module = build_recommender(config, dataset, device, ranks)
        ranker = config.model.ranker
        of_tasks = {task.name: ranker.task_weight * ranker.task_weights.get(task.name, 1.0) for task in dataset.manifest.tasks}
        self.weights = {RETRIEVAL: 1.0} | of_tasks
        self.metric = config.evaluation.metric
        self._bound: GroupBound | None = None
        self._config, self._dataset, self._device, self._ranks = config, dataset, device, ranks
        self._duals: list[float] = []
        self._has_texts = False
        share = Share(ranks.rank, ranks.world_size, config.training.accumulation_steps(ranks.world_size))
        self._reader = Reader(dataset, self.module.catalogue, config, share)
        self.guards = config.evaluation.guards
        self._users = read_evaluation_users(dataset, "validation", config.evaluation)
        self._exposed = ExposedTargets.read(dataset, "validation") if dataset.manifest.has_exposures else None
        self._measures = self._measure_by(config.evaluation)
        self._groups: dict[str, str] = {}  # group name by metric name
        if self._reader.groups is not None:
            self._bound = self.module.bound = GroupBound(config.fairness, self._reader.groups)
            self.weights = self.weights | dict.fromkeys(self._bound.names, 0.0)
            attribute = config.fairness.attribute
            self._groups = {f"{config.evaluation.ranking_metric} of {attribute} {name}": name for name in self._reader.groups.names}

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of an epoch's samples."""
        return self._reader.plan(epoch)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro batches of each step from `first_step` to the epoch's end."""
        return self._reader.steps(epoch, first_step)

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of text tokens encoded for a micro batch, once per distinct item."""
        encoder = self.module.item_encoder
        if encoder.text_encoder is None:
            return 0
        return int(encoder.token_counts[batch.items_on_host].sum())

    def before_step(self, step: int) -> None:
        """Refresh the cached text embeddings if that is due, or if the loaded state has none."""
        encoder, every = self.module.item_encoder, self._config.model.text.refresh_steps
        if encoder.kept_text is None:
            return
        if step % every == 0 or not (self._has_texts or bool(encoder.kept_text.any())):
            encoder.refresh_texts(self._ranks.rank, self._ranks.world_size)
        self._has_texts = True

    def validate(self) -> dict[str, float]:
        """Rank the whole catalogue and predict the tasks for the validation users, split over the ranks; return the metrics."""
        module, evaluation, measures = self.module, self._config.evaluation, self._measures
        rank, world_size = self._ranks.rank, self._ranks.world_size
        vectors = encode_catalogue(module.item_encoder, module.catalogue.num_items, self._device)
        predictor = Predictor(self._config, self._dataset.manifest, module.catalogue, module.user_encoder, module.ranker, *vectors)
        own = self._users[rank::world_size]
        ranked = rank_users(lists_by(predictor), _padded(self._users, self._ranks), evaluation).head(len(own))
        shares: list[Ranked] = [ranked] * world_size
        dist.all_gather_object(shares, ranked)
        ranked = Ranked.join(shares)
        exposed = {} if self._exposed is None else self._predict(predictor, self._exposed.users)
        tasks = measures.tasks(measures.labelled(self._predict(predictor, self._users), exposed))
        values = measures.per_user(ranked)[evaluation.ranking_metric]
        return measures.summarize(ranked) | tasks.values() | self._group_means(values)

    def _predict(self, predictor: Predictor, users: Sequence[EvaluationUser]) -> Predictions:
        """Predict the tasks for the targets of all users, each rank for its share; return the predictions rank by rank."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        most_targets = max((len(user.targets.items) for user in users), default=1)
        # The ranker is collective, too: the same number of calls on every rank.
        at_once = max(1, min(self._config.evaluation.batch_size, PAIRS_AT_ONCE // most_targets))
        predicted = predict_all(predict_by(predictor), _padded(users, self._ranks), at_once)
        num_targets = sum(len(user.targets.items) for user in users[rank::world_size])
        share = {name: values[:num_targets] for name, values in predicted.items()}
        shares = [share] * world_size
        dist.all_gather_object(shares, share)
        return {name: np.concatenate([of_rank[name] for of_rank in shares]) for name in predicted}

    def _measure_by(self, evaluation: EvaluationConfig) -> Measures:
        """Return the measures of the validation users, rank by rank; lists are compared by content only if that decides."""
        catalogue, num_ranks = self.module.catalogue, self._ranks.world_size
        users = [user for rank in range(num_ranks) for user in self._users[rank::num_ranks]]
        vectors, exposed = deciding_vectors(evaluation, catalogue), self._exposed
        if exposed is not None:
            entries = np.arange(len(exposed.users))
            exposed = exposed.ordered(np.concatenate([entries[rank::num_ranks] for rank in range(num_ranks)]))
        return Measures(evaluation, self._dataset.manifest, users, catalogue.train_count.numpy(), vectors, exposed)

    def _group_means(self, values: Floats) -> dict[str, float]:
        """Return the mean of `values`, ordered rank by rank, over each group's users; small groups are left out."""
        attribute = self._config.fairness.attribute
        groups = np.array([user.attributes.get(attribute) or "" for user in self._measures.users])
        members = {metric: values[groups == name] for metric, name in self._groups.items()}
        return {metric: float(own.mean()) for metric, own in members.items() if len(own) >= MIN_GROUP_USERS}

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Raise the weights of groups that are behind by more than the bound, and lower the others, from the next epoch on."""
        if self._bound is not None:
            metric = metrics[self._config.evaluation.ranking_metric]
            self._duals = self._bound.raised(self._duals, [metrics.get(name, metric) for name in self._groups], metric)
            self._bound.set_duals(self._duals)

    def state(self) -> dict[str, list[float]]:
        """Return the dual variables of the group bound, if there is one."""
        return {"duals": self._duals} if self._bound is not None else {}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Restore the dual variables."""
        if self._bound is not None:
            self._duals = state.get("duals", [])
            self._bound.set_duals(self._duals)


def _padded(users: Sequence[EvaluationUser], ranks: Ranks) -> Sequence[EvaluationUser]:
    """Return this rank's share of the users, and the first users again so that every rank has as many; their results are discarded.

    A ZeRO-3 forward is collective, so every rank needs the same number of calls.
    """
    own = list(users[ranks.rank :: ranks.world_size])
    return own + list(users[: -(-len(users) // ranks.world_size) - len(own)])
