"""The verb `python -m jobs.prepare_data`: events, items and users to a dataset; the work is `recsys.data.prepare`."""

import time
from dataclasses import asdict
from typing import Any

from recsys import runtime
from recsys.command import run_verb
from recsys.config import Config
from recsys.data.prepare import find_dataset, prepare
from recsys.storage import Storage


def prepare_data(config: Config) -> dict[str, Any]:
    """Make the dataset, or find it made, and describe it."""
    started = time.monotonic()
    storage = Storage.from_config(config.storage)
    dataset = find_dataset(config, storage)
    is_skipped = dataset is not None
    if dataset is None:
        with runtime.connect(config):
            dataset = prepare(config, storage)
    manifest = dataset.manifest
    return {
        "dataset": dataset.uri,
        "fingerprint": manifest.fingerprint,
        "num_users": manifest.num_users,
        "num_items": manifest.num_items,
        "num_interactions": manifest.num_interactions,
        "num_rejected": sum(manifest.rejected.values()),
        "rejected": manifest.rejected,
        "items_without_catalogue_entry": manifest.items_without_catalogue_entry,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.train_shards),
        "event_kinds": manifest.event_kinds,
        "tasks": [asdict(task) for task in manifest.tasks],
        "tie_rule": manifest.tie_rule,
        "skipped": is_skipped,
        "seconds": round(time.monotonic() - started, 3),
    }


if __name__ == "__main__":
    run_verb(prepare_data, __doc__)
