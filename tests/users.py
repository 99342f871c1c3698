"""Users of an evaluation, made by hand."""

from collections.abc import Mapping

import numpy as np

from recsys.data.sequences import Sequences
from recsys.evaluation.users import EvaluationUser


def evaluation_user(
    user_index: int, history: Sequences, targets: Sequences, attributes: Mapping[str, str] = {}, query: int = 0
) -> EvaluationUser:
    """Return a user who has seen the items of the history."""
    return EvaluationUser(user_index, history, targets, np.unique(history.items), dict(attributes), query)
