"""The manifest of a checkpoint, reading checkpoints, and which settings may differ on a resume.

Layout: `runs/{run}/checkpoints/step-{step}/{manifest.json, files-{attempt}/...}`. Readers trust only manifests, so files of dead attempts
are never read.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from recsys.config import Config
from recsys.config.base import Fact, leaves
from recsys.config.verb_settings import facts_of
from recsys.errors import UserError
from recsys.store import Storage, join, sha256_of
from recsys.train.engine import SHARED_FILE
from recsys.train.state import TrainingState

MANIFEST_NAME = "manifest.json"


class DamagedCheckpointError(UserError):
    """A checkpoint differs from what was saved."""


class CheckpointFile(BaseModel, frozen=True, extra="forbid"):
    """One file of a checkpoint, written by `rank`; `path` is relative to the attempt's folder."""

    path: str
    num_bytes: int
    sha256: str
    rank: int = 0

    @classmethod
    def of(cls, path: Path, folder: Path, rank: int = 0) -> Self:
        """Return the entry of a local file below `folder`."""
        return cls(path=path.relative_to(folder).as_posix(), num_bytes=path.stat().st_size, sha256=sha256_of(path), rank=rank)


class CheckpointManifest(BaseModel, frozen=True, extra="forbid"):
    """The origin, state and files of a checkpoint; `token` belongs to the owner that published it."""

    run: str
    token: int = 0
    state: TrainingState
    world_size: int
    zero_stage: int
    dataset: str
    dataset_fingerprint: str
    config: dict[str, Any]
    code_version: str
    attempt: str
    files: tuple[CheckpointFile, ...]

    def sealed(self) -> bytes:
        """Return the manifest as JSON whose first entry is the hash of the rest."""
        return _seal(self.model_dump_json(indent=1))

    @classmethod
    def unsealed(cls, data: bytes) -> Self:
        """Parse the output of `sealed`; raise a ValueError if it was changed."""
        body = "{\n" + data.decode().partition(",\n")[2]
        if _seal(body) != data:
            raise ValueError("its hash differs from the one that was written")
        return cls.model_validate_json(body)


def _seal(body: str) -> bytes:
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{\n "sha256": "{digest}",{body[1:]}'.encode()


def published_steps(storage: Storage, run: str) -> list[int]:
    """Return the steps of a run that have a published checkpoint, oldest first."""
    found = storage.list(storage.uri("runs", run, "checkpoints"))
    return sorted(steps_in(stored.uri for stored in found if stored.uri.endswith(f"/{MANIFEST_NAME}")))


def steps_in(addresses: Iterable[str]) -> set[int]:
    """Return the steps whose checkpoint folders contain these addresses; other addresses are ignored."""
    found = (re.search(r"/checkpoints/step-(\d{8,})/", address) for address in addresses)
    return {int(match[1]) for match in found if match}


def read_manifest(storage: Storage, uri: str) -> CheckpointManifest:
    """Return the manifest of the checkpoint at `uri`.

    Raises:
        UserError: there is no checkpoint at `uri`, or its manifest is damaged (DamagedCheckpointError).
    """
    if not uri or not storage.exists(join(uri, MANIFEST_NAME)):
        raise UserError(f"checkpoint = {uri or '(empty)'}: is not a checkpoint; give the 'checkpoint' that python -m jobs.train printed")
    try:
        return CheckpointManifest.unsealed(storage.read_bytes(join(uri, MANIFEST_NAME)))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise DamagedCheckpointError(f"checkpoint {uri}: {MANIFEST_NAME} is damaged ({reason})") from None


def fetch_files(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path, rank: int | None = None) -> None:
    """Download a checkpoint's files, or only those that `rank` needs, and verify them against the manifest.

    Raises:
        DamagedCheckpointError: a file is missing or damaged; the message names it.
    """
    for file in manifest.files:
        if rank in (None, file.rank) or Path(file.path).name == SHARED_FILE:
            fetch_file(storage, uri, f"files-{manifest.attempt}/{file.path}", file, folder)


def fetch_file(storage: Storage, uri: str, name: str, file: CheckpointFile, folder: Path) -> None:
    """Download the object `name` of the checkpoint at `uri` to `file.path` below `folder`, and verify it as `fetch_files` does."""
    source, path = join(uri, name), folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if not storage.exists(source):
        raise DamagedCheckpointError(f"checkpoint {uri}: {file.path} is missing")
    for _ in range(2):  # retry once, since it may have been damaged in transit
        storage.download(source, path)
        if path.stat().st_size == file.num_bytes and sha256_of(path) == file.sha256:
            return
    raise DamagedCheckpointError(f"checkpoint {uri}: {file.path} is damaged (its hash differs from the manifest's)")


def config_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the keys whose values forbid a resume, as `key: saved -> current`; a key that an earlier release lacked had its default."""
    before, after = dict(leaves(Config.model_validate(saved).model_dump(mode="json"))), dict(leaves(current))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and Fact.MAY_CHANGE not in facts_of(key)
    ]
