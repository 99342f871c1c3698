"""Predicts a user's value of an item from the user's other values: Bayesian linear regression, solved at every place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config.model import ModelConfig
from recsys.data.batch import PackedHistories
from recsys.data.manifest import DatasetManifest
from recsys.errors import UserError

NOISE_VARIANCE = 0.65
LEVEL_VARIANCE = 0.15
"""Of standardised values: what is left unexplained, and how far users lie apart in the mean. On MovieLens 100K they fit; learned
together with the factors the noise would shrink to what is known by heart."""


class ValueRegression(nn.Module):
    """value = b(v) + w . z(v) + noise for an item's vector v, where w ~ N(w0(u), 1) is the user's own.

    b and z are linear in v, and so are there for items that training never saw; the first of z is the user's level. w0 is linear in the
    user's state u: what the sequence tells before any value counts. Given the values so far, the mean of w has a closed form (Bishop
    2006, 3.3). A target's value is never among those that its w is made of, so z is learned for users yet to come (Bertinetto et al.
    2019). Shapes: P places of packed histories, N pairs, W width, K factors and the level.
    """

    def __init__(self, config: ModelConfig, manifest: DatasetManifest) -> None:
        super().__init__()
        size = config.ranker.num_factors
        self.value_mean, self.value_std = manifest.value_mean, manifest.value_std
        self.dropout = nn.Dropout(config.ranker.factor_dropout)
        self.factors = nn.Linear(config.width, size + 1)
        self.prior = nn.Linear(config.width, size + 1, bias=False)
        nn.init.normal_(self.factors.weight, std=0.1)
        nn.init.zeros_(self.factors.bias)
        nn.init.zeros_(self.prior.weight)

    def forward(self, users: Tensor, vectors: Tensor, histories: PackedHistories, places: Tensor) -> Tensor:
        """Return the mean of w (N, K) of users (N, W) after some places (N,) of histories, whose items have these vectors (P, W)."""
        is_known = ~histories.values.isnan()
        values = torch.where(is_known, (histories.values - self.value_mean) / self.value_std, 0.0)
        factors, biases = self.read(vectors)
        factors = factors * is_known.unsqueeze(1)
        squares, products = factors.unsqueeze(2) * factors.unsqueeze(1), factors * (values - biases).unsqueeze(1)
        moments = torch.cat([squares.flatten(1), products], 1)
        parts = zip(moments.split([number * length for number, length in histories.groups]), histories.groups, strict=True)
        so_far = torch.cat([part.view(number, length, -1).cumsum(1).flatten(0, 1) for part, (number, length) in parts])
        size = factors.shape[1]
        square, product = F.embedding(places, so_far).split([size * size, size], 1)
        square, prior = square.unflatten(1, (size, size)), self.prior(users).float().unsqueeze(2)
        noise = NOISE_VARIANCE * torch.eye(size, device=square.device)
        surprise = product.unsqueeze(2) - square @ prior
        return (prior + torch.linalg.solve_ex(square + noise, surprise)[0]).squeeze(2)

    def predict(self, weights: Tensor, items: Tensor) -> Tensor:
        """Return the standardised value (N,) that users with these w (N, K) will give to items (N, W)."""
        factors, biases = self.read(items)
        return (weights * factors).sum(1) + biases

    def read(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (P, K) and b (P,) of items in float32."""
        read = self.factors(self.dropout(vectors)).float()
        level = torch.full_like(read[:, :1], LEVEL_VARIANCE**0.5)
        return torch.cat([level, read[:, 1:]], 1), read[:, 0]


def build_regression(config: ModelConfig, manifest: DatasetManifest) -> ValueRegression | None:
    """Build it where the config wants it.

    Raises:
        UserError: the data has no values.
    """
    if config.ranker.kind != "regression":
        return None
    if not manifest.has_values:
        raise UserError("model.ranker.kind = 'regression' learns from values, and this dataset has none; set concatenation or data.columns")
    return ValueRegression(config, manifest)
