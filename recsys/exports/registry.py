"""Versions of exports and the aliases that point to them.

`{root}/exports/{name}/versions/{version}/manifest.json` is a create-once write and is written last, so a version is either complete or
absent. Its files are next to it, in a folder of the attempt that won. `{root}/exports/{name}/aliases/{alias}/` is a log with one
create-once object per generation: the highest generation is current, and the history is never lost.
"""

import re
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recsys.config import Config
from recsys.errors import UserError
from recsys.store import Storage, join, private_folder, sha256_of

MANIFEST_NAME = "manifest.json"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=_Record)


class ExportFile(_Record):
    """One file of an export; `path` is relative to the folder that was published."""

    path: str
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExportManifest(_Record):
    """The files and metadata of a version; `attempt` is the folder next to the manifest that holds the files."""

    format_version: Literal[1] = 1
    name: Name
    version: Name
    created_at: str = Field(default_factory=_now)
    attempt: Name
    files: tuple[ExportFile, ...]
    metadata: dict[str, Any]


class AliasEntry(_Record):
    """One generation of an alias: the version that it points to, and why."""

    generation: Annotated[int, Field(ge=1)]
    version: Name
    action: Literal["promote", "roll_back"]
    reason: str
    created_at: str = Field(default_factory=_now)


class Registry:
    """The versions and aliases of one export name. Stateless: every call reads the store."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = _checked("name", name)
        self._root = storage.uri("exports", name)

    @classmethod
    def of_service(cls, config: Config) -> "Registry":
        """Return the registry of the export that the config's service serves."""
        return cls(Storage.from_config(config.storage), config.served_export)

    def publish(self, folder: Path, version: str, metadata: dict[str, Any]) -> tuple[ExportManifest, bool]:
        """Publish all files below `folder` as a version; return the version's manifest and whether this call created it.

        Idempotent: an existing version is returned as it is. If publishers race, one wins and the others delete their uploads. A publisher
        that dies leaves a folder that no manifest refers to and that is never read.
        """
        if self._storage.exists(self._manifest_uri(version)):
            return self.manifest(version), False
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise UserError(f"{folder}: has no files to publish; give the folder that an export was written to")
        manifest = ExportManifest(
            name=self._name,
            version=version,
            attempt=f"files-{uuid.uuid4().hex}",
            files=tuple(
                ExportFile(path=path.relative_to(folder).as_posix(), num_bytes=path.stat().st_size, sha256=sha256_of(path))
                for path in paths
            ),
            metadata=metadata,
        )
        for file in manifest.files:
            self._storage.upload(folder / file.path, self._file_uri(manifest, file.path))
        is_new = self._storage.create(self._manifest_uri(version), manifest.model_dump_json(indent=1).encode())
        if not is_new:
            self._storage.delete_tree(join(self.uri(version), manifest.attempt))
        return self.manifest(version), is_new

    def uri(self, version: str) -> str:
        """Return the folder of a version."""
        return join(self._root, "versions", _checked("version", version))

    def versions(self) -> list[str]:
        """List the published versions, sorted by name."""
        root = join(self._root, "versions")
        paths = [found.uri.removeprefix(f"{root}/").split("/") for found in self._storage.list(root)]
        return [path[0] for path in paths if path[1:] == [MANIFEST_NAME]]

    def manifest(self, version: str) -> ExportManifest:
        """Read a version's manifest.

        Raises:
            UserError: the version does not exist, or its manifest is damaged or belongs to another version.
        """
        uri = self._manifest_uri(version)
        if not self._storage.exists(uri):
            known = ", ".join(self.versions()) or "none"
            raise UserError(f"export {self._name} has no version '{version}'; published: {known}")
        manifest = self._read(uri, ExportManifest)
        if (manifest.name, manifest.version) != (self._name, version):
            raise UserError(f"{uri}: is the manifest of {manifest.name} {manifest.version}; publish {self._name} {version} again")
        return manifest

    def fetch(self, version: str, folder: Path, only: Collection[str] = ()) -> Path:
        """Download a version's files, or `only` some, to `folder/name/version`, verify their sizes and hashes, and return that path.

        Files that are already there and intact are not downloaded again.

        Raises:
            UserError: a file is missing in the store or differs from the manifest.
        """
        manifest = self.manifest(version)
        target = private_folder(folder / self._name / version)
        for file in manifest.files:
            if only and file.path not in only:
                continue
            local = Path(join(str(target), file.path))
            if _find_damage(local, file) is None:
                continue
            uri = self._file_uri(manifest, file.path)
            self._storage.download(uri, local)
            damage = _find_damage(local, file)
            if damage is not None:
                local.unlink()
                raise UserError(f"{uri}: {damage}; publish a new version")
        return target

    def read(self, manifest: ExportManifest, path: str) -> bytes:
        """Read one small file of a version without verifying it."""
        return self._storage.read_bytes(self._file_uri(manifest, path))

    def history(self, alias: str) -> list[AliasEntry]:
        """Read all generations of an alias, oldest first."""
        return [self._read(uri, AliasEntry) for uri in self._generations(alias)]

    def current(self, alias: str) -> AliasEntry | None:
        """Return the current generation of an alias, or None."""
        uris = self._generations(alias)
        return self._read(uris[-1], AliasEntry) if uris else None

    def resolve(self, alias: str) -> str | None:
        """Return the version that an alias points to, or None."""
        entry = self.current(alias)
        return entry.version if entry else None

    def promote(self, alias: str, version: str, reason: str, seen: int | None = None) -> bool:
        """Point an alias to `version`; return whether it points to it now.

        `seen` is the generation that the decision was based on (0: none yet). If the alias has changed since, nothing happens and the
        result is False: compare again. Without `seen`, the last promotion wins.

        Raises:
            UserError: the version does not exist.
        """
        self.manifest(version)
        while True:
            latest = self.current(alias)
            generation = latest.generation if latest else 0
            if seen is not None and seen != generation:
                return False
            if latest and latest.version == version:
                return True
            if self._append(alias, AliasEntry(generation=generation + 1, version=version, action="promote", reason=reason)):
                return True

    def roll_back(self, alias: str, reason: str) -> str:
        """Point an alias to its previous version again and return that version; repeated calls go further back.

        Raises:
            UserError: there is no previous version, or the alias was moved at the same time.
        """
        history = self.history(alias)
        version = previous_version(history)
        if version is None:
            raise UserError(
                f"alias {alias} of export {self._name} has no earlier version; promote one of: {', '.join(self.versions()) or 'none'}"
            )
        entry = AliasEntry(generation=history[-1].generation + 1, version=version, action="roll_back", reason=reason)
        if not self._append(alias, entry):
            raise UserError(
                f"alias {alias} of export {self._name} was moved by another process at the same time; check it and roll back again"
            )
        return version

    def _manifest_uri(self, version: str) -> str:
        return join(self.uri(version), MANIFEST_NAME)

    def _file_uri(self, manifest: ExportManifest, path: str) -> str:
        return join(self.uri(manifest.version), manifest.attempt, path)

    def _alias_uri(self, alias: str) -> str:
        return join(self._root, "aliases", _checked("alias", alias))

    def _generations(self, alias: str) -> list[str]:
        uris = [found.uri for found in self._storage.list(self._alias_uri(alias))]
        return [uri for uri in uris if re.fullmatch(r"\d{8}\.json", uri.rpartition("/")[2])]

    def _append(self, alias: str, entry: AliasEntry) -> bool:
        return self._storage.create(join(self._alias_uri(alias), f"{entry.generation:08d}.json"), entry.model_dump_json().encode())

    def _read(self, uri: str, kind: type[Record]) -> Record:
        try:
            return kind.model_validate_json(self._storage.read_bytes(uri))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise UserError(f"{uri}: is damaged or of another release ({where}: {first['msg']}); use or publish another version") from error


def previous_version(history: list[AliasEntry]) -> str | None:
    """Return the version that a rollback leads to: promotions push onto a stack, and a rollback pops the top."""
    stack: list[str] = []
    for entry in history:
        if entry.action == "roll_back":
            while stack and stack[-1] != entry.version:
                stack.pop()
        if not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack[-2] if len(stack) > 1 else None


def _find_damage(path: Path, file: ExportFile) -> str | None:
    """Return how a local file differs from the published one, or None."""
    if not path.is_file():
        return "is not there"
    if (num_bytes := path.stat().st_size) != file.num_bytes:
        return f"has {num_bytes} bytes where the manifest says {file.num_bytes}"
    return None if sha256_of(path) == file.sha256 else "has another sha256 than the manifest says"


def _checked(kind: str, name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"export {kind} '{name}': must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return name
