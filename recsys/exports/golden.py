"""Golden answers: stored with an export and compared whenever it is loaded."""

from itertools import islice
from typing import Any

import numpy as np

from recsys.data.sequences import Sequences
from recsys.data.text.queries import EVALUATION_VARIANT, drop_words
from recsys.errors import UserError
from recsys.exports.profiles import ArrowProfiles, ProfileStore
from recsys.predictor import Predictor

TOLERANCE = 1e-4


def golden_answers(predictor: Predictor, profiles: ArrowProfiles, num_users: int, k: int = 10) -> list[dict[str, Any]]:
    """Answer for some users. A model that learned queries answers each once more, for words of the text of the item taken last."""
    users = list(islice(profiles.items(), num_users))
    asked: list[tuple[str, str | None, Sequences]] = [(user_id, None, history) for user_id, history in users]
    if predictor.query_encoder is not None:
        taken = [(user_id, item, history) for user_id, history in users for item in history.items[-1:].tolist()]
        texts = predictor.catalogue.texts
        asked += [(user_id, drop_words(texts[item], item, EVALUATION_VARIANT), history) for user_id, item, history in taken]
    if not asked:
        return []
    user_ids, queries, histories = zip(*asked, strict=True)
    rankings = predictor.recommend(histories, k, [history.items for history in histories], queries)
    return [
        {"user_id": user_id, "query": query, "items": ranking.items.tolist(), "scores": ranking.scores.tolist()}
        for user_id, query, ranking in zip(user_ids, queries, rankings, strict=True)
    ]


def check_golden(predictor: Predictor, profiles: ProfileStore, golden: list[dict[str, Any]]) -> None:
    """Compare with the published answers.

    Raises:
        UserError: a user is missing, or a score differs by more than `TOLERANCE`.
    """
    for row in golden:
        history = profiles.find(str(row["user_id"]))
        if history is None:
            raise UserError(f"export: user {row['user_id']} of its golden answers is missing; publish it again")
        scores = predictor.score_catalogue([history], [row.get("query")]).numpy()[0][np.asarray(row["items"], dtype=np.int64)]
        if not np.allclose(scores, row["scores"], rtol=TOLERANCE, atol=TOLERANCE):
            raise UserError(f"export: user {row['user_id']} gets other scores than when it was published; publish it again")
