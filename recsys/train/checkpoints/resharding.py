"""Converts a checkpoint for another number of ranks, once, and verifies the result.

Layout: `runs/{run}/checkpoints/step-{step}/universal-{attempt}.{tar, json}`; the JSON file, the archive's size and hash, is last.
"""

import logging
import shutil
import tarfile
from pathlib import Path

from recsys.data.node_files import shared_entry
from recsys.store import Storage, join, private_folder
from recsys.train.checkpoints.manifest import CheckpointFile, CheckpointManifest, DamagedCheckpointError, fetch_file, fetch_files
from recsys.train.engine import SHARDED_SUFFIX, convert_to_universal

logger = logging.getLogger(__name__)


def needs_conversion(manifest: CheckpointManifest, world_size: int) -> bool:
    """Return whether `world_size` ranks need a converted checkpoint, because its optimizer shards are for another number."""
    return manifest.world_size != world_size and any(file.path.endswith(SHARDED_SUFFIX) for file in manifest.files)


def offer_universal(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    """Write a checkpoint's universal form next to it, unless an intact one exists, and unpack it to `folder`. One process calls this."""
    if storage.exists(join(uri, f"universal-{manifest.attempt}.json")):
        try:
            return fetch_universal(storage, uri, manifest, folder)
        except DamagedCheckpointError as error:
            logger.warning("%s; converting the checkpoint again", error)
    _convert(storage, uri, manifest, folder.with_name(f"convert-{manifest.attempt}"))
    return fetch_universal(storage, uri, manifest, folder)


def fetch_universal(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    """Unpack a checkpoint's universal form to `folder`, once per node."""

    def unpack(new: Path) -> None:
        file = CheckpointFile.model_validate_json(storage.read_bytes(join(uri, f"universal-{manifest.attempt}.json")))
        fetch_file(storage, uri, f"universal-{manifest.attempt}.tar", file, new)
        with tarfile.open(new / file.path) as tar:
            tar.extractall(new, filter="data")
        (new / file.path).unlink()

    with shared_entry(folder, unpack):
        pass


def _convert(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    logger.info("step %d: converting the checkpoint of %d workers so that any number can load it", manifest.state.step, manifest.world_size)
    shutil.rmtree(folder, ignore_errors=True)  # left by a dead attempt
    archive = private_folder(folder) / "universal.tar"
    fetch_files(storage, uri, manifest, folder / "saved")
    convert_to_universal(folder / "saved", folder / "universal")
    with tarfile.open(archive, "w") as tar:
        tar.add(folder / "universal", arcname=".")
    storage.upload(archive, join(uri, f"universal-{manifest.attempt}.tar"))
    record = CheckpointFile.of(archive, folder).model_dump_json().encode()
    storage.write_bytes(join(uri, f"universal-{manifest.attempt}.json"), record)
    shutil.rmtree(folder)
