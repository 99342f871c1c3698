"""Publish a checkpoint as an immutable version, and promote it to production if it is no worse."""

import hashlib
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys import __version__
from recsys.config import Config
from recsys.errors import UserError
from recsys.exports.registry import ExportManifest, Registry
from recsys.launch.command import run_verb
from recsys.store import Storage, private_folder

if TYPE_CHECKING:
    from recsys.data.manifest import Dataset
    from recsys.train.checkpoints.manifest import CheckpointManifest

logger = logging.getLogger(__name__)

CANDIDATE, PRODUCTION = "candidate", "production"


def run(config: Config) -> dict[str, Any]:
    """Export `export.checkpoint` under `export.name`; a published checkpoint is not published again."""
    from recsys.train.checkpoints.load_recommender import check_given

    storage = Storage.from_config(config.storage)
    registry = Registry(storage, config.export_name)
    checkpoint = check_given(storage, config, config.export.checkpoint)
    version = version_of(checkpoint)
    if version in registry.versions():
        logger.info("export: %s is published already", version)
        manifest = registry.manifest(version)
    else:
        manifest = _publish(config, storage, registry, version)
    if registry.resolve(CANDIDATE) != version:
        registry.promote(CANDIDATE, version, "newest export")
    alias, reason = promote(config, storage, registry, manifest)
    logger.info("export: %s is %s (%s)", version, alias, reason)
    return {"version": version, "uri": registry.uri(version), "alias": alias, "reason": reason, "metrics": manifest.metadata["metrics"]}


def version_of(checkpoint: "CheckpointManifest") -> str:
    """Return the version's name, from the checkpoint's run, step and content; the same checkpoint always gets the same name."""
    content = hashlib.sha256("".join(sorted(file.sha256 for file in checkpoint.files)).encode()).hexdigest()
    return f"{checkpoint.run.replace('/', '.')}-{checkpoint.state.step:08d}-{content[:8]}"


def _publish(config: Config, storage: Storage, registry: Registry, version: str) -> ExportManifest:
    from recsys.evaluation.evaluator import evaluate
    from recsys.exports.files import write_export
    from recsys.train.checkpoints.load_recommender import build_predictor, load_trained, with_given_ranking

    checkpoint, trained, dataset, recommender = load_trained(storage, config.export.checkpoint, config.run.scratch)
    predictor = build_predictor(with_given_ranking(trained, config), dataset, recommender)
    plain = config.evaluation.model_copy(update={"split": "validation", "baselines": (), "diversity": (), "fairness_attributes": ()})
    metrics = evaluate(predictor, dataset, plain)["metrics"]
    folder = private_folder(Path(config.run.scratch) / "exports" / version)
    write_export(predictor, recommender.state_dict(), dataset, folder, config.export.num_golden)
    metadata = {
        "run": checkpoint.run,
        "step": checkpoint.state.step,
        "dataset": dataset.uri,
        "dataset_fingerprint": dataset.manifest.fingerprint,
        "code_version": __version__,
        "split": "validation",
        "metrics": metrics,
    }
    manifest, _ = registry.publish(folder, version, metadata)
    shutil.rmtree(folder)
    return manifest


def promote(config: Config, storage: Storage, registry: Registry, manifest: ExportManifest) -> tuple[str, str]:
    """Move the production alias if `export.promote` allows it; return the version's highest alias and the reason."""
    metric, rule = config.evaluation.metric, config.export.promote
    current = registry.current(PRODUCTION)
    if current and current.version == manifest.version:
        return PRODUCTION, "in production already"
    if rule == "never":
        return CANDIDATE, "export.promote = never"
    value = manifest.metadata["metrics"].get(metric)
    if rule != "always" and (value is None or not math.isfinite(value)):
        return CANDIDATE, f"its validation {metric} is not a number"
    is_chosen, reason = True, "the first version" if current is None else "export.promote = always"
    if current and rule != "always":
        is_chosen, reason = _compare(config, storage, registry, manifest, registry.manifest(current.version))
    if not is_chosen:
        return CANDIDATE, reason
    is_promoted = registry.promote(PRODUCTION, manifest.version, reason, seen=current.generation if current else 0)
    return (PRODUCTION, reason) if is_promoted else (CANDIDATE, "another version was promoted meanwhile; run the export again")


def _compare(config: Config, storage: Storage, registry: Registry, new: ExportManifest, old: ExportManifest) -> tuple[bool, str]:
    """Evaluate both versions on the newer one of their datasets; return whether the new one replaces the old one, and why."""
    from recsys.evaluation.decisions.promotion import compare_versions, decide
    from recsys.exports.files import load_export

    scratch = private_folder(Path(config.run.scratch) / "exports")
    candidate, incumbent = (load_export(registry.fetch(each.version, scratch)).predictor for each in (new, old))
    dataset = newer_dataset(storage, new.metadata["dataset"], old.metadata.get("dataset", ""))
    changes = compare_versions(candidate, incumbent, dataset, config.evaluation, Path(config.run.scratch))
    is_chosen, reason = decide(changes, config.evaluation.metric, config.evaluation.guards, config.export.promote)
    return is_chosen, f"{reason} of {old.version}, on the validation users of {dataset.uri}"


def newer_dataset(storage: Storage, new: str, old: str) -> "Dataset":
    """Return the dataset of the new version, unless the one of the old version was appended to it."""
    from recsys.data.manifest import Dataset

    dataset, other = Dataset.open(storage, new), None
    uri = old
    while uri:
        try:
            ancestor = Dataset.open(storage, uri)
        except UserError:  # deleted
            break
        if ancestor.uri == dataset.uri:
            return other or dataset
        other = other or ancestor
        uri = ancestor.sibling(ancestor.manifest.base) if ancestor.manifest.base else ""
    return dataset


if __name__ == "__main__":
    run_verb("jobs.export", run, __doc__)
