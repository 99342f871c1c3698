"""Scores a (user, item) pair for each task, such as like, rating, click or purchase."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config.model import ModelConfig
from recsys.data.batch import PackedHistories
from recsys.model.value_regression import ValueRegression
from recsys.schema import Task


class Ranker(nn.Module):
    """One score per task of a user's state u and an item's vector v. Shapes: N pairs, W width, T tasks, E experts.

    f_P(u, v) is, for each task, a linear reading of what experts make of the pair, mixed by a gate of the task's own where there are
    several (MMoE: Ma et al. 2018), plus a user bias, linear in u, and an item bias, linear in v: both hold for those never seen.

    `concatenation`: f_P alone; an expert is silu(A [u, v, u * v]).

    `additive`: f_P + gate_text text + gate_sequence history. An expert is A u * B v, so f_P is bilinear; text is (Q u) . x, x being the
    item's text alone as the item encoder projects it, zero where there is none; history is u . v, the score that retrieval ranks by.
    Both gates are a number per task and start at 0.

    `regression`: tasks made of values are a x r + c, a and c learned per task, r being what `regression` expects the user to say of the
    item; the others are f_P as in `concatenation`. A user is then the state and the weights of the regression beside it.
    """

    log_negative_rates: Tensor  # (T,)
    is_value: Tensor  # (T,)

    def __init__(
        self,
        config: ModelConfig,
        tasks: Sequence[Task],
        has_text: bool,
        negative_rates: Tensor | None = None,
        regression: ValueRegression | None = None,
    ) -> None:
        super().__init__()
        width, num_experts, num_tasks = config.width, config.ranker.num_experts, len(tasks)
        self.width, self.num_tasks, self.num_experts = width, num_tasks, num_experts
        self.is_additive = config.ranker.kind == "additive"
        self.is_text_matched = self.is_additive and has_text
        num_outputs = max(1, num_tasks)
        if self.is_additive:
            self.user_experts = nn.Linear(width, num_experts * width)
            self.item_experts = nn.Linear(width, num_experts * width)
            self.gate_sequence = nn.Parameter(torch.zeros(num_outputs))
        else:
            self.experts = nn.Linear(3 * width, num_experts * width)
        if self.is_text_matched:
            self.text_query = nn.Linear(width, width, bias=False)
            self.gate_text = nn.Parameter(torch.zeros(num_outputs))
        if num_experts > 1:
            self.mixture = nn.Linear(3 * width, num_outputs * num_experts)
        self.heads = nn.Linear(width, num_outputs, bias=False)
        self.biases = nn.Linear(2 * width, num_outputs)
        self.regression = regression
        if regression is not None:
            self.scale, self.shift = nn.Parameter(torch.ones(num_tasks)), nn.Parameter(torch.zeros(num_tasks))
            self.register_buffer("is_value", torch.tensor([task.event is None for task in tasks]), persistent=False)
        self.register_buffer("log_negative_rates", torch.zeros(num_tasks) if negative_rates is None else negative_rates.log())

    def read_users(self, users: Tensor, vectors: Tensor, histories: PackedHistories, places: Tensor) -> Tensor:
        """Return what pairs are scored by of users (N, W) after some places (N,) of histories, whose items have these vectors (P, W)."""
        if self.regression is None:
            return users
        return torch.cat([users, self.regression(users, vectors, histories, places).to(users.dtype)], 1)

    def forward(self, users: Tensor, items: Tensor, texts: Tensor | None = None) -> Tensor:
        """Score pairs of users, as `read_users` gives them, and items (N, W).

        Only the additive form reads `texts` (N, W), zero where an item has none.

        Returns:
            (N, T): logits for binary tasks, standardised values for regression.
        """
        users, weights = users[..., : self.width], users[..., self.width :]
        product = users * items
        pairs = torch.cat([users, items, product], -1)  # (N, 3 W)
        hidden = self.user_experts(users) * self.item_experts(items) if self.is_additive else F.silu(self.experts(pairs))
        readings = self.heads(hidden.unflatten(-1, (self.num_experts, -1)))  # (N, E, T)
        if self.num_experts > 1:
            readings = readings * self.mixture(pairs).unflatten(-1, (self.num_experts, -1)).softmax(-2)
        scores = readings.sum(-2) + self.biases(pairs[..., : 2 * users.shape[-1]])
        if self.is_additive:
            scores = scores + self.gate_sequence * product.sum(-1, keepdim=True)
        if self.is_text_matched:
            scores = scores + self.gate_text * (self.text_query(users) * texts).sum(-1, keepdim=True)
        scores = scores[..., : self.num_tasks]
        if self.regression is not None:
            values = self.regression.predict(weights, items).unsqueeze(-1)
            scores = torch.where(self.is_value, self.scale * values + self.shift, scores)
        return scores

    def calibrate(self, scores: Tensor) -> Tensor:
        """Undo, in logits (..., T), that training saw negatives at their `negative_rates` alone.

        With q of the scores and w the rate, p = q / (q + (1 - q) / w) (He et al. 2014), which is logit p = logit q + log w.
        """
        return scores + self.log_negative_rates
