"""Rows with label columns as events of histories."""

import numpy as np
import pyarrow as pa

from recsys.config import load_config
from recsys.ingest.write.exposures import history_events, in_histories, label_kinds
from recsys.schema import EVENT, LABEL_PREFIX, Kind

KINDS = (Kind("exposure", "exposure", marks_seen=False), Kind("click"), Kind("buy"))


def test_a_row_without_any_known_label_is_no_event() -> None:
    labels = {"columns.labels": {"click": "clicked", "buy": "bought"}, "kinds": {"exposure": {"in_history": True}}}
    data = load_config().with_values({f"data.{name}": value for name, value in labels.items()}).data
    events = pa.table(
        {
            EVENT: pa.nulls(6, pa.string()),
            f"{LABEL_PREFIX}click": pa.array([0, 1, None, 1, None, None], pa.int8()),
            f"{LABEL_PREFIX}buy": pa.array([0, 0, None, 1, 0, 1], pa.int8()),
        }
    )
    assert in_histories(events, data).to_pylist() == [True, True, False, True, True, True]
    assert label_kinds(events, [kind.name for kind in KINDS]).tolist() == [0, 1, -1, 2, 0, 2]
    found, offsets = history_events(events, np.array([0, 2, 6]), KINDS, data)
    assert found[EVENT].to_pylist() == ["exposure", "click", "click", "buy", "exposure", "buy"]
    assert offsets.tolist() == [0, 2, 6]
