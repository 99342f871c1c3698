"""The ranker: scores of (user, item) pairs for each task, for example like, rating or click, and the losses of these scores.

Shapes: N pairs, W width, T tasks, P places of packed histories.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config.model import ModelConfig, RankerConfig
from recsys.data.batch import PackedHistories
from recsys.data.labels.training import NUM_DISPLAYS
from recsys.data.manifest import DatasetManifest
from recsys.errors import UserError
from recsys.model.user_encoder import by_group, known_values
from recsys.schema import Task, taken_follows_shown

NOISE_VARIANCE = 0.65
LEVEL_VARIANCE = 0.15
"""Variances of standardized values: the residual noise, and the spread of user means. They fit MovieLens 100K. Learned together with
the factors, the noise would shrink to the training error."""


class ValueRegression(nn.Module):
    """Predicts a user's value of an item from the user's other values: Bayesian linear regression, solved at every place.

    The values are those of the interactions. In data without values they are 1 for an item that the weakest positive event was of and 0
    for one that was only shown or that a negative event was of, standardized like values.

    value = b(v) + w . z(v) + noise for an item vector v, where w ~ N(w0(u), 1) belongs to the user. b and z are linear in v, so they
    exist for items not seen in training. The first entry of z is constant: its weight is the user's level. The prior mean w0 is linear
    in the user state u. Given the values so far, the mean of w has a closed form (Bishop 2006, 3.3). The w of a target never includes
    the target's own value, so z is trained to generalize to new users (Bertinetto et al. 2019). Shape K: factors plus the level.
    """

    of_kinds: Tensor  # (2, kinds + 1) number of observations and sum of values that an event adds; empty if interactions have values

    def __init__(self, config: ModelConfig, manifest: DatasetManifest) -> None:
        super().__init__()
        size = config.ranker.num_factors
        self.value_mean, self.value_std = manifest.value_mean, manifest.value_std
        self.event = None if manifest.has_values else manifest.kind_table[manifest.default_kind].name
        self.register_buffer("of_kinds", torch.zeros(0) if manifest.has_values else _observations(manifest), persistent=False)
        self.dropout = nn.Dropout(config.ranker.factor_dropout)
        self.factors = nn.Linear(config.width, size + 1)
        self.prior = nn.Linear(config.width, size + 1, bias=False)
        nn.init.normal_(self.factors.weight, std=0.1)
        nn.init.zeros_(self.factors.bias)
        nn.init.zeros_(self.prior.weight)

    def forward(self, users: Tensor, vectors: Tensor, histories: PackedHistories, places: Tensor) -> Tensor:
        """Return the mean of w (N, K) for users (N, W) after `places` (N,) of histories whose items have `vectors` (P, W)."""
        numbers, values = self._observe(histories)
        factors, biases = self.read(vectors)
        observed = factors * numbers.unsqueeze(1)
        squares, products = observed.unsqueeze(2) * factors.unsqueeze(1), factors * (values - numbers * biases).unsqueeze(1)
        moments = torch.cat([squares.flatten(1), products], 1)
        so_far = torch.cat([part.cumsum(1).flatten(0, 1) for part in by_group(moments, histories)])
        size = factors.shape[1]
        square, product = F.embedding(places, so_far).split([size * size, size], 1)
        square, prior = square.unflatten(1, (size, size)), self.prior(users).float().unsqueeze(2)
        noise = NOISE_VARIANCE * torch.eye(size, device=square.device)
        surprise = product.unsqueeze(2) - square @ prior
        return (prior + torch.linalg.solve_ex(square + noise, surprise)[0]).squeeze(2)

    def predict(self, weights: Tensor, items: Tensor) -> Tensor:
        """Return the predicted standardized values (N,) of items (N, W) for users with weights w (N, K)."""
        factors, biases = self.read(items)
        return (weights * factors).sum(1) + biases

    def predicts(self, task: Task) -> bool:
        """Return whether a task is on the values: their size, or whether the weakest positive event happens."""
        return task.event == self.event

    def _observe(self, histories: PackedHistories) -> tuple[Tensor, Tensor]:
        """Return how many values each place adds (P,), and their standardized sum (P,)."""
        if self.event is None:
            is_known, values = known_values(histories, self.value_mean, self.value_std)
            return is_known.to(values), values
        return self.of_kinds[0, histories.events], self.of_kinds[1, histories.events]

    def read(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (P, K) and b (P,) of item vectors (P, W), in float32."""
        read = self.factors(self.dropout(vectors)).float()
        level = torch.full_like(read[:, :1], LEVEL_VARIANCE**0.5)
        return torch.cat([level, read[:, 1:]], 1), read[:, 0]


def _observations(manifest: DatasetManifest) -> Tensor:
    """Return how many values an event of each kind adds, and their standardized sum, (2, kinds + 1), 0 for padding.

    In a log of events a click follows its exposure. It adds no value but turns the exposure's 0 into a 1.
    """
    kinds, mean, std = manifest.kind_table, manifest.value_mean, manifest.value_std
    numbers = torch.tensor([0.0, *(float(kind.says_untaken) for kind in kinds)])
    values = -mean / std * numbers
    taken = manifest.default_kind + 1
    numbers[taken], values[taken] = (0.0, 1 / std) if taken_follows_shown(kinds, manifest.has_labels) else (1.0, (1 - mean) / std)
    return torch.stack([numbers, values])


def build_regression(config: ModelConfig, manifest: DatasetManifest) -> ValueRegression | None:
    """Build the regression, or return None for another kind of ranker.

    Raises:
        UserError: histories have neither values nor events that say that an item was not taken, or the dataset is too old.
    """
    if config.ranker.kind != "regression":
        return None
    if not manifest.has_values and (manifest.value_mean == 0 or not any(kind.says_untaken for kind in manifest.kind_table)):
        raise UserError(
            "model.ranker.kind = 'regression' learns from values, or from exposures and negative events in histories; this has none, or an "
            "older version prepared it; set concatenation, or prepare it with data.columns.value or data.kinds.exposure.in_history=true"
        )
    return ValueRegression(config, manifest)


class Ranker(nn.Module):
    """Computes one score per task from a user state u and an item vector v. Shape E: experts.

    f_P(u, v) is, for each task, a linear readout of the experts' outputs, mixed by a gate per task if there are several experts
    (MMoE: Ma et al. 2018), plus a user bias, linear in u, and an item bias, linear in v. Both also exist for unseen users and items.

    `concatenation`: f_P alone; an expert is silu(A [u, v, u * v]).

    `additive`: f_P + gate_text text + gate_sequence history. An expert is A u * B v, so f_P is bilinear. text is (Q u) . x, where x is
    the item encoder's projection of the item's text, zero without text. history is u . v, the retrieval score. Both gates are one
    number per task and start at 0.

    A task in `config.ranker.needs` has the probability p q, where p is the score of its own and q that of the task that it needs.

    `regression`: scores of tasks on values (`ValueRegression.predicts`) are a x r + c, with a and c learned per task and r the predicted
    value; the others are f_P as in `concatenation`. The user input is then the state concatenated with the weights of the regression.
    """

    log_negative_rates: Tensor  # (T,)
    display_shares: Tensor  # (NUM_DISPLAYS + 1,)
    is_value: Tensor  # (T,)

    def __init__(
        self,
        config: ModelConfig,
        tasks: Sequence[Task],
        has_text: bool,
        negative_rates: Tensor | None = None,
        regression: ValueRegression | None = None,
        display_shares: Tensor | None = None,
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
        names = [task.name for task in tasks]
        self.needs = [
            (names.index(name), names.index(other)) for name, other in sorted(config.ranker.needs.items(), key=_depth(config.ranker))
        ]
        self.regression = regression
        if regression is not None:
            self.scale, self.shift = nn.Parameter(torch.ones(num_tasks)), nn.Parameter(torch.zeros(num_tasks))
            self.register_buffer("is_value", torch.tensor([regression.predicts(task) for task in tasks]), persistent=False)
        has_displays = display_shares is not None and num_tasks > 0
        self.display_bias = nn.Parameter(torch.zeros(NUM_DISPLAYS + 1, num_tasks)) if has_displays else None
        self.register_buffer("display_shares", display_shares, persistent=False)
        self.register_buffer("log_negative_rates", torch.zeros(num_tasks) if negative_rates is None else negative_rates.log())

    def read_users(self, users: Tensor, vectors: Tensor, histories: PackedHistories, places: Tensor) -> Tensor:
        """Return the ranker's input for users (N, W) after `places` (N,) of histories whose items have `vectors` (P, W)."""
        if self.regression is None:
            return users
        return torch.cat([users, self.regression(users, vectors, histories, places).to(users.dtype)], 1)

    def forward(self, users: Tensor, items: Tensor, texts: Tensor | None = None) -> Tensor:
        """Score pairs of users, as returned by `read_users`, and items (N, W).

        Only the additive kind reads `texts` (N, W), zero for items without text.

        Returns:
            (N, T): logits for binary tasks, standardized values for regression.
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
        if self.needs:
            columns = list(scores.unbind(-1))
            for column, other in self.needs:
                columns[column] = _both(columns[column], columns[other])
            scores = torch.stack(columns, -1)
        return scores

    def add_display_bias(self, scores: Tensor, displays: Tensor) -> Tensor:
        """Add a learned bias by position of display to the scores of exposures, the last of the pairs (N + E, T); only in training.

        The biases have the mean 0 over the exposures, so that a score without bias, as it is served, is that of a mean position.
        """
        if self.display_bias is None:
            return scores
        centered, num_targets = self.display_bias - self.display_shares @ self.display_bias, len(scores) - len(displays)
        # Also without exposures: every rank's parameters need a gradient.
        return torch.cat([scores[:num_targets], scores[num_targets:] + F.embedding(displays.clamp(max=NUM_DISPLAYS), centered)])

    def calibrate(self, scores: Tensor) -> Tensor:
        """Correct logits (..., T) for the sampling of negatives at `negative_rates` in training.

        For a predicted probability q and a rate w, p = q / (q + (1 - q) / w) (He et al. 2014), which is logit p = logit q + log w.
        """
        return scores + self.log_negative_rates


def _both(conditional: Tensor, other: Tensor) -> Tensor:
    """Return the logit of p q for the logits of p and q (ESMM: Ma et al. 2018)."""
    log_both = F.logsigmoid(conditional.float()) + F.logsigmoid(other.float())
    return (log_both - torch.log(-torch.expm1(log_both.clamp(max=-1e-6)))).to(conditional.dtype)


def _depth(config: RankerConfig) -> Callable[[tuple[str, str]], int]:
    """Return a sort key under which a task comes after the one that it needs."""

    def depth(pair: tuple[str, str]) -> int:
        name, steps = pair[1], 0
        while name in config.needs and steps <= len(config.needs):
            name, steps = config.needs[name], steps + 1
        return steps

    return depth


class TaskLosses(nn.Module):
    """Sums each task's loss over its labels.

    BCE for binary tasks, squared error for regression. With `imbalance = weight` a positive has weight 1 / `negative_rates` (T,).

    With `weighting = uncertainty` (Kendall et al. 2018) a task has a learned log variance s. A label of a binary task contributes
    exp(-s) loss + s / 2, of a regression task exp(-s) loss / 2 + s / 2. Because s / 2 is added per label, sums over parts of the labels,
    divided by the global number of labels, add up to the formula. Reported losses can be negative.
    """

    positive_weights: Tensor  # (T,)

    def __init__(self, config: RankerConfig, tasks: Sequence[Task], negative_rates: Tensor) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.register_buffer(
            "positive_weights", 1 / negative_rates if config.imbalance == "weight" else torch.ones(len(tasks)), persistent=False
        )
        is_learned = config.weighting == "uncertainty" and len(tasks) > 0
        self.log_variances = nn.Parameter(torch.zeros(len(tasks))) if is_learned else None

    def forward(self, scores: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the sum of each task's loss over the labels where `mask` is 1; all inputs are (N, T)."""
        losses = {}
        for column, task in enumerate(self.tasks):
            score, label, is_value = scores[:, column].float(), labels[:, column], task.kind == "regression"
            if is_value:
                loss = F.mse_loss(score, label, reduction="none")
            else:
                weight = self.positive_weights[column]
                loss = F.binary_cross_entropy_with_logits(score, label, pos_weight=weight, reduction="none")
            if self.log_variances is not None:
                log_variance = self.log_variances[column].float()
                loss = torch.exp(-log_variance) * (loss / 2 if is_value else loss) + log_variance / 2
            losses[task.name] = (loss * mask[:, column]).sum()
        return losses
