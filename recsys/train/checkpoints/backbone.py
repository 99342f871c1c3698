"""Publishes the pretrained language model of a checkpoint as a folder for `model.text.backbone`."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.model.text.backbones import load_backbone, load_tokenizer
from recsys.model.text.encoder import locate_backbone
from recsys.model.text.pretraining import BACKBONE_PREFIX
from recsys.store import Storage, join, private_folder
from recsys.train.checkpoints.load_recommender import load_weights
from recsys.train.checkpoints.manifest import MANIFEST_NAME, CheckpointFile, CheckpointManifest, read_manifest


class BackboneManifest(BaseModel, frozen=True, extra="forbid"):
    """The origin and files of a published backbone. Written last: a folder without it is incomplete."""

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
    """Publish the language model of a pretraining checkpoint, unless already done; return its folder in the store.

    The folder's name is derived from the content of the checkpoint's files.
    """
    trained = read_manifest(storage, checkpoint)
    content = repr(sorted((file.path, file.sha256) for file in trained.files))
    name = f"{trained.run.replace('/', '.')}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    uri = storage.uri("backbones", name)
    if storage.exists(join(uri, MANIFEST_NAME)):
        return uri
    folder = private_folder(scratch / "backbones" / f"publish-{name}")
    _write_backbone(storage, checkpoint, trained, scratch, folder)
    files = [CheckpointFile.of(path, folder) for path in sorted(folder.iterdir())]
    for file in files:
        storage.upload(folder / file.path, join(uri, file.path))
    made_of = trained.model_dump(include={"run", "dataset", "dataset_fingerprint", "config", "code_version"})
    state = trained.state
    manifest = BackboneManifest(checkpoint=checkpoint, steps=state.step, validation=state.validation, files=tuple(files), **made_of)
    storage.create(join(uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    shutil.rmtree(folder)
    return uri


def _write_backbone(storage: Storage, checkpoint: str, trained: CheckpointManifest, scratch: Path, folder: Path) -> None:
    text = Config.model_validate(trained.config).model.text.model_copy(update={"mode": "full"})
    start = locate_backbone(text, Dataset.open(storage, trained.dataset), scratch)
    backbone: Any = load_backbone(start, text)
    weights, prefix = load_weights(storage, checkpoint, trained, str(scratch)), BACKBONE_PREFIX
    backbone.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)})
    backbone.save_pretrained(folder)
    load_tokenizer(start).save_pretrained(folder)
