"""The config section `ranking`: what decides the order of a list."""

from typing import Self

from pydantic import model_validator

from recsys.config.base import Count, Section

RETRIEVAL = "retrieval"


class RankingConfig(Section):
    """What decides the order of a list: the retrieval score alone, or a weighted sum of all scores over the best candidates."""

    num_candidates: Count = 0
    """Items with the best retrieval scores that the blend orders; 0: the retrieval score alone decides."""
    blend: dict[str, float] = {RETRIEVAL: 1.0}  # noqa: RUF012 - pydantic copies defaults
    """Weights of the scores: `retrieval` (log of its softmax over the catalogue), tasks, and products of tasks such as `click*buy`."""

    @model_validator(mode="after")
    def _check_blend(self) -> Self:
        if not any(self.blend.values()):
            raise ValueError("ranking.blend must have a weight other than 0; {retrieval = 1.0, click = 0.5} would work")
        return self
