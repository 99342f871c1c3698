"""Inference with loaded weights: user vectors, scores, rankings. Evaluation, batch scoring and the service run this code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Integers, Mask, Scores
from recsys.config import Config
from recsys.data.batch import PackedHistories, group_cost, has_profiles, has_start, map_tensors, pack
from recsys.data.items import ItemFeatures
from recsys.data.manifest import DatasetManifest
from recsys.data.sequences import ASKED, HISTORY_COLUMNS, Sequences
from recsys.errors import UserError
from recsys.model.item_encoder import ItemEncoder
from recsys.model.ranker import Ranker
from recsys.model.retrieval import RetrievalScores
from recsys.model.text.queries import QueryEncoder
from recsys.model.user_encoder import UserEncoder

ENCODE_CHUNK = 4096
PAIRS_AT_ONCE = 65_536
"""Maximum number of (user, item) pairs that the ranker scores in one call, unless one user has more."""

Queries = Sequence[str | None]
"""Each user's query text; None: no query."""


@dataclass(frozen=True)
class Rule:
    """What a request demands of its items: which are allowed, and what is added to their scores."""

    allowed: Mask | None = None  # (I + 1,)
    boost: Scores | None = None  # (I + 1,)

    def apply(self, scores: Scores) -> Scores:
        """Return scores (I + 1,) with the boost, and -inf for items that are not allowed."""
        if self.boost is not None:
            scores = scores + self.boost
        return scores if self.allowed is None else np.where(self.allowed, scores, np.float32(-np.inf))


NO_RULE = Rule()
Rules = Sequence[Rule]
"""Each user's rule."""


@dataclass(frozen=True)
class Ranking:
    """Items from best to worst with their scores; ties are ordered by ascending catalogue index."""

    items: Integers  # (k,)
    scores: NDArray[np.float32]  # (k,)
    parts: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # (k,) the scores that were blended, by name

    def head(self, k: int) -> "Ranking":
        """Return the best k items."""
        return Ranking(self.items[:k], self.scores[:k], {name: values[:k] for name, values in self.parts.items()})


@dataclass(eq=False)
class Predictor:
    """Ranks items for users given by a history and, if the model learned queries, a query text. B users, I items, W width."""

    config: Config
    manifest: DatasetManifest
    catalogue: ItemFeatures
    user_encoder: UserEncoder
    ranker: Ranker
    item_vectors: Tensor  # (I + 1, W) row 0 for padding
    text_vectors: Tensor | None = None  # (I + 1, W) of the text alone, if the ranker uses it
    query_encoder: QueryEncoder | None = None

    def __post_init__(self) -> None:
        self.event_index = {kind: index for index, kind in enumerate(self.manifest.event_kinds)}
        self.popularity = self.catalogue.train_count.float()  # (I + 1,)
        self.popularity[0] = -torch.inf
        self._retrieval = RetrievalScores(self.item_vectors)
        self._has_start = has_start(self.config.model, self.manifest)
        self._nobody = self.manifest.profiles.encode([{}]) if has_profiles(self.config.model, self.manifest) else None

    @property
    def reads_profiles(self) -> bool:
        """Whether a user without history has a list of their own, by profile."""
        return self._nobody is not None

    @property
    def reads_contexts(self) -> bool:
        """Whether the context of a request changes the answer."""
        return self.user_encoder.context is not None

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Catalogue index by item id; built on first use, since training and evaluation do not need it."""
        return {item_id: index for index, item_id in enumerate(self.catalogue.item_ids) if index}

    @torch.no_grad()
    def encode(self, histories: Sequence[Sequences], queries: Queries | None = None) -> Tensor:
        """Return user vectors (B, W) for the profiles and the asked contexts that the histories have.

        They carry no information for an empty history without a query, unless the model reads profiles (see `popular`).

        Raises:
            UserError: there is a query, but the model was trained without queries.
        """
        return self._encode(histories, queries)[0].float()

    def _encode(self, histories: Sequence[Sequences], queries: Queries | None) -> tuple[Tensor, Tensor, PackedHistories, Tensor]:
        """Return user vectors (B, W), the packed histories' item vectors (P, W), the packed histories, and each user's last place (B,)."""
        recent = Sequences.join([self._complete(history.last(self.config.data.max_history)) for history in histories])
        device = self.item_vectors.device
        typed = [query for query in queries or () if query is not None]
        if typed and self.query_encoder is None:
            raise UserError("model.query_rate = 0: this model was trained without queries; ask without, or train with model.query_rate=0.5")
        has_query = np.array([query is not None for query in queries or ()]) if typed else None
        packed, first_places = pack(recent, group_cost(device.type == "cuda"), has_query, self._has_start)
        packed = map_tensors(packed, lambda tensor: tensor.to(device))
        vectors = F.embedding(packed.items, self.item_vectors).to(self.user_encoder.norm_in.weight.dtype)
        states = self.user_encoder(vectors, packed, self.query_encoder(typed) if self.query_encoder is not None and typed else None)
        num_places = recent.lengths if has_query is None else recent.lengths + has_query
        places = torch.from_numpy(first_places + np.maximum(num_places, 1 - self._has_start) - 1).to(device)
        users = F.embedding(places, states)
        if ASKED in recent.scalars:
            users = self.user_encoder.ask(users, torch.from_numpy(recent.scalars[ASKED]).to(device))
        return users, vectors, packed, places

    def _complete(self, history: Sequences) -> Sequences:
        """Return a history with a profile and a context, unknown ones if it has none, as far as the model reads them."""
        if not (self.reads_profiles or self.reads_contexts):
            return replace(history, scalars={}, profiles=None)
        columns = {name: history.columns[name] for name in HISTORY_COLUMNS}
        asked = history.scalars.get(ASKED, np.zeros(1, np.int64))
        asked = asked if len(history.items) else self.manifest.contexts.without_history(asked)
        scalars = {ASKED: asked} if self.reads_contexts else {}
        return replace(history, columns=columns, scalars=scalars, profiles=history.profiles or self._nobody, exposures=None)

    @torch.no_grad()
    def score_catalogue(self, histories: Sequence[Sequences], queries: Queries | None = None) -> Tensor:
        """Return the retrieval scores (B, I + 1) of all items on the CPU; -inf for padding."""
        scores = self._retrieval(self.encode(histories, queries)).float().cpu()
        scores[:, 0] = -torch.inf
        return scores

    def recommend(
        self,
        histories: Sequence[Sequences],
        k: int,
        exclude: Sequence[Integers],
        queries: Queries | None = None,
        rules: Rules | None = None,
    ) -> list[Ranking]:
        """Return each user's top k items without the excluded ones and by their rule; fewer if no others are left.

        `ranking.blend` orders the first `ranking.num_candidates`; those after them keep the order of retrieval.
        """
        scores, num_candidates = self.score_catalogue(histories, queries).numpy(), self.config.ranking.num_candidates
        rules = [NO_RULE] * len(histories) if rules is None else rules
        parts = zip(scores, exclude, rules, strict=True)
        rankings = [top_k(rule.apply(row), max(k, num_candidates), excluded) for row, excluded, rule in parts]
        return [ranking.head(k) for ranking in (self._blend(histories, rankings, scores, queries, rules) if num_candidates else rankings)]

    def score_lists(self, histories: Sequence[Sequences], exclude: Sequence[Integers], queries: Queries | None = None) -> Scores:
        """Return scores (B, I + 1) that order all items like `recommend`."""
        scores: Scores = self.score_catalogue(histories, queries).numpy()
        num_candidates = self.config.ranking.num_candidates
        if not num_candidates:
            return scores
        candidates = [top_k(row, num_candidates, excluded) for row, excluded in zip(scores, exclude, strict=True)]
        for user, blended in enumerate(self._blend(histories, candidates, scores, queries, [NO_RULE] * len(candidates))):
            if len(blended.items):
                scores[user] -= scores[user][np.isfinite(scores[user])].max() - blended.scores.min() + 1
                scores[user, blended.items] = blended.scores
        return scores

    def _blend(
        self,
        histories: Sequence[Sequences],
        rankings: Sequence[Ranking],
        scores: Scores,
        queries: Queries | None,
        rules: Rules,
    ) -> list[Ranking]:
        """Order the candidates of each ranking by the weighted sum of their scores; `scores` (B, I + 1) are those of retrieval."""
        num_candidates = self.config.ranking.num_candidates
        most = max(num_candidates, *(len(ranking.items) for ranking in rankings)) if len(rankings) else num_candidates
        tasks = self.score(histories, [ranking.items for ranking in rankings], queries, most_candidates=most)
        return [self._blend_one(*parts, num_candidates) for parts in zip(scores, rankings, tasks, rules, strict=True)]

    def _blend_one(self, row: Scores, ranking: Ranking, parts: dict[str, Scores], rule: Rule, num_candidates: int) -> Ranking:
        items = ranking.items
        parts["retrieval"] = (row[items] - torch.from_numpy(row).double().logsumexp(0).item()).astype(np.float32)
        blended = np.zeros(len(items), np.float32) if rule.boost is None else rule.boost[items].astype(np.float32)
        for name, weight in self.config.ranking.blend.items():
            blended += np.float32(weight) * np.prod([self._part(parts, part) for part in name.split("*")], axis=0, dtype=np.float32)
        if len(blended) > num_candidates:
            blended[num_candidates:] = blended[:num_candidates].min() - 1 - np.arange(len(blended) - num_candidates)
        order = np.lexsort((items, -blended))
        return Ranking(items[order], blended[order], {name: values[order] for name, values in parts.items()})

    def _part(self, parts: dict[str, Scores], name: str) -> NDArray[np.float32]:
        if name not in parts:
            raise UserError(f"ranking.blend: '{name}' is not a score of this model; its scores: {', '.join(parts)}")
        return parts[name]

    def popular(self, k: int, exclude: Integers, rule: Rule = NO_RULE) -> Ranking:
        """Rank by the number of training interactions, for users without a history."""
        return top_k(rule.apply(self.popularity.numpy()), k, exclude)

    def similar(self, item: int, k: int, exclude: Integers, rule: Rule = NO_RULE) -> Ranking:
        """Rank items by the cosine of their vectors with an item's, without the item itself."""
        scores = (self._directions @ self._directions[item]).float().cpu().numpy()
        scores[0] = -np.inf
        return top_k(rule.apply(scores), k, np.append(exclude, item))

    @cached_property
    def _directions(self) -> Tensor:
        return F.normalize(self.item_vectors.float(), dim=1)

    @torch.no_grad()
    def score(
        self,
        histories: Sequence[Sequences],
        candidates: Sequence[Integers],
        queries: Queries | None = None,
        *,
        most_candidates: int | None = None,
    ) -> list[dict[str, NDArray[np.float32]]]:
        """Score candidates (catalogue indices) for each user.

        With `most_candidates` the number of the ranker's calls depends only on that and the number of users.

        Returns:
            Per user: `retrieval` and each task's calibrated probability (binary) or value (regression), one number per candidate.
        """
        encoded = self._encode(histories, queries)
        users, ranked_users = encoded[0].float(), self.ranker.read_users(*encoded)
        results: list[dict[str, NDArray[np.float32]]] = []
        for rows in _calls([most_candidates or len(chosen) for chosen in candidates]):
            pairs = self._score_tasks(ranked_users[rows], candidates[rows])
            for user, chosen, tasks in zip(users[rows], candidates[rows], pairs, strict=True):
                indices = torch.from_numpy(chosen).to(users.device)
                results.append({"retrieval": self._retrieval(user.unsqueeze(0), indices)[0].float().cpu().numpy(), **tasks})
        return results

    def _score_tasks(self, ranked_users: Tensor, candidates: Sequence[Integers]) -> list[dict[str, NDArray[np.float32]]]:
        """Return each user's task scores of the candidates, computed in one call of the ranker."""
        lengths = [len(chosen) for chosen in candidates]
        indices = torch.from_numpy(np.concatenate(candidates)).to(ranked_users.device)
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(ranked_users.device)
        dtype = self.ranker.heads.weight.dtype
        items = self.item_vectors[indices].to(dtype)
        texts = None if self.text_vectors is None else self.text_vectors[indices].to(dtype)
        ranked = self.ranker.calibrate(self.ranker(ranked_users[owners], items, texts).float())
        scores: list[dict[str, NDArray[np.float32]]] = [{} for _ in lengths]
        for task, column in zip(self.manifest.tasks, ranked.unbind(1), strict=True):
            is_value = task.kind == "regression"
            values = column * self.manifest.value_std + self.manifest.value_mean if is_value else column.sigmoid()
            for own, part in zip(scores, values.cpu().split(lengths), strict=True):
                own[task.name] = part.numpy()
        return scores


def top_k(scores: NDArray[np.float32], k: int, exclude: Integers) -> Ranking:
    """Return the top k of one user's scores (I + 1,) without excluded and -inf items; ties are ordered by ascending index."""
    scores = scores.copy()
    scores[exclude] = -np.inf
    k = min(k, int(np.isfinite(scores).sum()))
    if k == 0:
        return Ranking(np.zeros(0, np.int64), np.zeros(0, np.float32))
    threshold = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero(scores >= threshold)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return Ranking(order, scores[order])


def _calls(num_pairs: Sequence[int]) -> Iterator[slice]:
    """Cut users into consecutive runs of at most PAIRS_AT_ONCE pairs, or of one user."""
    begin, total = 0, 0
    for row, number in enumerate(num_pairs):
        if row > begin and total + number > PAIRS_AT_ONCE:
            yield slice(begin, row)
            begin, total = row, 0
        total += number
    if begin < len(num_pairs):
        yield slice(begin, len(num_pairs))


@torch.no_grad()
def encode_catalogue(item_encoder: ItemEncoder, num_items: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return item vectors and, if the ranker uses text, text vectors, (I + 1, W) float32. Under ZeRO-3 every rank must call this."""
    was_training = item_encoder.training
    item_encoder.eval()
    chunks = [item_encoder.with_text(indices.to(device), indices) for indices in torch.arange(num_items + 1).split(ENCODE_CHUNK)]
    item_encoder.train(was_training)
    texts = [text.float() for _, text in chunks if text is not None]
    return torch.cat([items.float() for items, _ in chunks]), torch.cat(texts) if texts else None
