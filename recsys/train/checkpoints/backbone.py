"""Publishes a pretrained language model from a checkpoint, as a folder that `model.text.backbone` can name."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.model.text.backbones import load_backbone, load_tokenizer
from recsys.model.text.encoder import locate_backbone
from recsys.model.text.pretraining import BACKBONE_PREFIX
from recsys.store import Storage, join, private_folder, sha256_of
from recsys.train.checkpoints.manifest import MANIFEST_NAME, CheckpointFile, CheckpointManifest, fetch_files, read_manifest
from recsys.train.engine import consolidate


class BackboneManifest(BaseModel):
    """What a published backbone was made of; written last, so that a folder without it does not count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    checkpoint: str
    steps: int
    dataset: str
    dataset_fingerprint: str
    config: dict[str, Any]
    code_version: str
    validation: dict[str, float]
    files: tuple[CheckpointFile, ...]


def publish_backbone(storage: Storage, checkpoint: str, scratch: Path) -> str:
    """Publish the language model of a pretraining's checkpoint, unless that was done; return its folder in the store.

    The folder's name follows from what the checkpoint's files hold.
    """
    trained = read_manifest(storage, checkpoint)
    content = repr(sorted((file.path, file.sha256) for file in trained.files))
    name = f"{trained.run.replace('/', '.')}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    uri = storage.uri("backbones", name)
    if not storage.exists(join(uri, MANIFEST_NAME)):
        folder = private_folder(scratch / "backbones" / f"publish-{name}")
        _write_backbone(storage, checkpoint, trained, scratch, folder)
        files = sorted(path for path in folder.iterdir())
        for path in files:
            storage.upload(path, join(uri, path.name))
        storage.create(join(uri, MANIFEST_NAME), _manifest(trained, checkpoint, files).model_dump_json(indent=1).encode())
        shutil.rmtree(folder)
    return uri


def _write_backbone(storage: Storage, checkpoint: str, trained: CheckpointManifest, scratch: Path, folder: Path) -> None:
    """Write config, weights and tokenizer to a folder."""
    text = Config.model_validate(trained.config).model.text.model_copy(update={"mode": "full"})
    start = locate_backbone(text, Dataset.open(storage, trained.dataset), scratch)
    backbone: Any = load_backbone(start, text)
    state = private_folder(scratch / "checkpoints" / f"whole-{trained.attempt}")
    fetch_files(storage, checkpoint, trained, state)
    weights = consolidate(state)
    shutil.rmtree(state)
    prefix = BACKBONE_PREFIX
    backbone.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)})
    backbone.save_pretrained(folder)
    load_tokenizer(start).save_pretrained(folder)


def _manifest(trained: CheckpointManifest, checkpoint: str, files: list[Path]) -> BackboneManifest:
    return BackboneManifest(
        run=trained.run,
        checkpoint=checkpoint,
        steps=trained.state.step,
        dataset=trained.dataset,
        dataset_fingerprint=trained.dataset_fingerprint,
        config=trained.config,
        code_version=trained.code_version,
        validation=trained.state.validation,
        files=tuple(CheckpointFile(path=path.name, num_bytes=path.stat().st_size, sha256=sha256_of(path)) for path in files),
    )
