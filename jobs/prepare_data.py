"""Turn events, items and users into a dataset, or a day of events into its next version."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recsys.config import Config
from recsys.launch.command import run_verb
from recsys.launch.head import connect
from recsys.store import Storage, join

if TYPE_CHECKING:
    from recsys.data.manifest import Dataset


def prepare_data(config: Config) -> dict[str, Any]:
    """Make the dataset, or find it made, and describe it."""
    from recsys.ingest.prepare import find_dataset, prepare

    started = time.monotonic()
    storage = Storage.from_config(config.storage)
    found = find_dataset(config, storage)
    if found is not None:
        return describe(found, is_skipped=True, seconds=time.monotonic() - started)
    with connect(config):
        dataset = prepare(config, storage)
    return describe(dataset, is_skipped=False, seconds=time.monotonic() - started)


def describe(dataset: "Dataset", is_skipped: bool, seconds: float) -> dict[str, Any]:
    """Describe the dataset and how it was made; `rows_per_second` counts the interactions of this version, null where skipped."""
    from recsys.data.manifest import Dataset
    from recsys.report.pages import DATASET

    manifest = dataset.manifest
    num_before = Dataset.open(dataset.storage, dataset.sibling(manifest.base)).manifest.num_interactions if manifest.base else 0
    return {
        "dataset": dataset.uri,
        "report": join(dataset.uri, DATASET.page_name),
        "version": manifest.version,
        "base": manifest.base,
        "fingerprint": manifest.fingerprint,
        "num_users": manifest.num_users,
        "num_items": manifest.num_items,
        "num_interactions": manifest.num_interactions,
        "num_rejected": sum(manifest.rejected.values()),
        "rejected": manifest.rejected,
        "rejected_examples": {rule: [each.model_dump() for each in found] for rule, found in manifest.rejected_examples.items()},
        "noticed": manifest.noticed,
        "unused_columns": [use.model_dump(exclude={"use"}) for use in manifest.columns if not use.use],
        "warnings": manifest.warnings,
        "time_unit": manifest.time_unit,
        "items_without_catalogue_entry": manifest.items_without_catalogue_entry,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.train_shards),
        "event_kinds": manifest.event_kinds,
        "tasks": [asdict(task) for task in manifest.tasks],
        "tie_rule": manifest.tie_rule,
        "skipped": is_skipped,
        "seconds": round(seconds, 3),
        "rows_per_second": None if is_skipped else round((manifest.num_interactions - num_before) / seconds, 1),
    }


if __name__ == "__main__":
    run_verb("jobs.prepare_data", prepare_data, __doc__)
