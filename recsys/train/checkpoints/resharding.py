"""Converts a checkpoint for another number of ranks, once, and verifies the result.

Layout: `runs/{run}/checkpoints/step-{step}/universal-{attempt}.{tar, json}`; the second, the archive's size and hash, is written last.
"""

import logging
import shutil
import tarfile
from pathlib import Path

from recsys.data.node_files import shared_entry
from recsys.store import Storage, join, private_folder, sha256_of
from recsys.train.checkpoints.manifest import CheckpointFile, CheckpointManifest, DamagedCheckpointError, fetch_file, fetch_files
from recsys.train.engine import SHARDED_SUFFIX, convert_to_universal

logger = logging.getLogger(__name__)


def needs_conversion(manifest: CheckpointManifest, world_size: int) -> bool:
    """Return whether `world_size` ranks cannot load the files as they are: each holds one rank's part of the optimizer's state."""
    return manifest.world_size != world_size and any(file.path.endswith(SHARDED_SUFFIX) for file in manifest.files)


def offer_universal(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    """Put a checkpoint's universal form beside it, unless it is there and whole, and unpack it to `folder`. For one process of the run.

    Raises:
        DamagedCheckpointError: a file of the checkpoint is missing or damaged.
    """
    is_damaged = False
    if storage.exists(_record(uri, manifest)):
        try:
            fetch_universal(storage, uri, manifest, folder)
        except DamagedCheckpointError as error:
            is_damaged = True
            logger.warning("%s; converting the checkpoint again", error)
    if is_damaged or not folder.exists():
        _convert(storage, uri, manifest, folder.with_name(f"convert-{manifest.attempt}"))
        fetch_universal(storage, uri, manifest, folder)


def fetch_universal(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    """Unpack a checkpoint's universal form to `folder`, once for all processes of this node.

    Raises:
        DamagedCheckpointError: it is not what was written.
    """

    def unpack(new: Path) -> None:
        file = CheckpointFile.model_validate_json(storage.read_bytes(_record(uri, manifest)))
        archive = new / file.path
        fetch_file(storage, uri, _archive(uri, manifest), file, archive)
        with tarfile.open(archive) as tar:
            tar.extractall(new, filter="data")
        archive.unlink()

    with shared_entry(folder, unpack):
        pass


def _convert(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    logger.info("step %d: converting what %d workers have saved, for any number of them", manifest.state.step, manifest.world_size)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that died
    archive = private_folder(folder) / "universal.tar"
    fetch_files(storage, uri, manifest, folder / "saved")
    convert_to_universal(folder / "saved", folder / "universal")
    with tarfile.open(archive, "w") as tar:
        tar.add(folder / "universal", arcname=".")
    storage.upload(archive, _archive(uri, manifest))
    file = CheckpointFile(path=archive.name, num_bytes=archive.stat().st_size, sha256=sha256_of(archive))
    storage.write_bytes(_record(uri, manifest), file.model_dump_json().encode())
    shutil.rmtree(folder)


def _archive(uri: str, manifest: CheckpointManifest) -> str:
    return join(uri, f"universal-{manifest.attempt}.tar")


def _record(uri: str, manifest: CheckpointManifest) -> str:
    return join(uri, f"universal-{manifest.attempt}.json")
