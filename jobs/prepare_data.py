"""Turn events, items and users into a dataset, or append new events as its next version."""

import time
from typing import Any

from recsys.config import Config
from recsys.launch.command import run_verb
from recsys.launch.head import connect
from recsys.store import Storage, join

SHOWN = {
    *("version", "base", "fingerprint", "num_users", "num_items", "num_interactions", "rejected", "rejected_examples", "noticed"),
    *("warnings", "time_unit", "items_without_catalogue_entry", "event_kinds", "tasks", "tie_rule"),
}
"""Manifest fields that are printed unchanged."""


def run(config: Config) -> dict[str, Any]:
    """Make the dataset, or open it if it exists, and describe it; `rows_per_second` counts the interactions of this version."""
    from recsys.data.manifest import Dataset
    from recsys.ingest.prepare import find_dataset, prepare
    from recsys.report.pages import DATASET

    started = time.monotonic()
    storage = Storage.from_config(config.storage)
    dataset = found = find_dataset(config, storage)
    if dataset is None:
        with connect(config):
            dataset = prepare(config, storage)
    seconds = time.monotonic() - started
    manifest = dataset.manifest
    num_before = Dataset.open(storage, dataset.sibling(manifest.base)).manifest.num_interactions if manifest.base else 0
    return {
        "dataset": dataset.uri,
        "report": join(dataset.uri, DATASET.page_name),
        **manifest.model_dump(include=SHOWN),
        "num_rejected": sum(manifest.rejected.values()),
        "unused_columns": [use.model_dump(exclude={"use"}) for use in manifest.columns if not use.use],
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.train_shards),
        "skipped": found is not None,
        "seconds": round(seconds, 3),
        "rows_per_second": None if found else round((manifest.num_interactions - num_before) / seconds, 1),
    }


if __name__ == "__main__":
    run_verb("jobs.prepare_data", run, __doc__)
