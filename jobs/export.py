"""Publish a checkpoint as an immutable version, and promote it to production if it is better."""

import hashlib
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys import __version__
from recsys.config import Config
from recsys.exports.registry import ExportManifest, Registry, is_better
from recsys.launch.command import run_verb
from recsys.store import Storage, private_folder

if TYPE_CHECKING:
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
    alias, reason = promote(config, registry, manifest)
    logger.info("export: %s is %s (%s)", version, alias, reason)
    return {"version": version, "uri": registry.uri(version), "alias": alias, "reason": reason, "metrics": manifest.metadata["metrics"]}


def version_of(checkpoint: "CheckpointManifest") -> str:
    """Return the version's name, from the checkpoint's run, step and content; the same checkpoint always gets the same name."""
    content = hashlib.sha256("".join(sorted(file.sha256 for file in checkpoint.files)).encode()).hexdigest()
    return f"{checkpoint.run.replace('/', '.')}-{checkpoint.state.step:08d}-{content[:8]}"


def _publish(config: Config, storage: Storage, registry: Registry, version: str) -> ExportManifest:
    from recsys.evaluation.evaluator import evaluate
    from recsys.exports.files import write_export
    from recsys.train.checkpoints.load_recommender import build_predictor, load_trained

    checkpoint, trained, dataset, recommender = load_trained(storage, config.export.checkpoint, config.run.scratch)
    predictor = build_predictor(trained, dataset, recommender)
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


def promote(config: Config, registry: Registry, manifest: ExportManifest) -> tuple[str, str]:
    """Move the production alias if `export.promote` allows it; return the version's highest alias and the reason."""
    metric, metrics = config.evaluation.metric, manifest.metadata["metrics"]
    current = registry.current(PRODUCTION)
    if current and current.version == manifest.version:
        return PRODUCTION, "in production already"
    incumbent = registry.manifest(current.version) if current else None
    if config.export.promote == "never":
        return CANDIDATE, "export.promote = never"
    if config.export.promote == "if_better" and not is_better(metrics, incumbent.metadata["metrics"] if incumbent else None, metric):
        return CANDIDATE, f"not better than {current.version if current else 'nothing'} by validation {metric}"
    reason = "the first version"
    if incumbent:
        before, after = (found.get(metric) or math.nan for found in (incumbent.metadata["metrics"], metrics))
        is_same_data = incumbent.metadata["dataset_fingerprint"] == manifest.metadata["dataset_fingerprint"]
        reason = f"validation {metric} {after:.4f} over {before:.4f} on {'the same' if is_same_data else 'another'} dataset"
    is_promoted = registry.promote(PRODUCTION, manifest.version, reason, seen=current.generation if current else 0)
    return (PRODUCTION, reason) if is_promoted else (CANDIDATE, "another version was promoted meanwhile; run the export again")


if __name__ == "__main__":
    run_verb("jobs.export", run, __doc__)
