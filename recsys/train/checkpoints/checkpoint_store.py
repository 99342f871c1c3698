"""The checkpoints of one run: written asynchronously, published last, and found on resume."""

import hashlib
import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors.torch import load_file, save

from recsys import __version__
from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import StoreError, UserError
from recsys.store import Storage, join, private_folder, sha256_of
from recsys.store.errors import explained
from recsys.train.checkpoints.compatibility import config_differences, superfluous_steps
from recsys.train.checkpoints.lease import Ownership, SupersededError
from recsys.train.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointFile,
    CheckpointManifest,
    DamagedCheckpointError,
    fetch_files,
    published_steps,
    read_manifest,
    steps_in,
)
from recsys.train.checkpoints.resharding import fetch_universal, needs_conversion, offer_universal
from recsys.train.engine import Engine, Snapshot
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_FILES = TypeAdapter(list[CheckpointFile])


class CheckpointStore:
    """The checkpoints of one run. As a context, it waits at the end for what it has begun, unless the block raised."""

    def __init__(self, storage: Storage, config: Config, dataset: Dataset, token: int = 0) -> None:
        self._storage = storage
        self._config = config
        self._dataset = dataset
        self._owner = Ownership(storage, config.run.name, token)
        self._uri = storage.uri("runs", config.run.name, "checkpoints")
        self._scratch = Path(config.run.scratch) / "checkpoints" / hashlib.sha256(self._uri.encode()).hexdigest()[:12]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: list[Future[None]] = []
        self._is_abandoned = threading.Event()
        self._attempt = ""

    def __enter__(self) -> Self:
        """Begin nothing yet."""
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Wait for what was begun; after an error only for a while, since another rank's part may never come."""
        if error_type is None:
            self.wait()
        wait(self._begun, GRACE_SECONDS)
        self._is_abandoned.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def uri(self, step: int) -> str:
        """Return the address of the checkpoint of a step."""
        return join(self._uri, f"step-{step:08d}")

    def steps(self) -> list[int]:
        """List the steps that have a published checkpoint, oldest first."""
        return published_steps(self._storage, self._config.run.name)

    def newest(self) -> CheckpointManifest | None:
        """Return the last manifest that can be read; None where the run has no checkpoint.

        Raises:
            UserError: none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step)
            except DamagedCheckpointError as error:
                logger.warning("%s", error)
        if steps:
            raise UserError(
                f"run.name = {self._config.run.name}: the manifests of all its checkpoints are damaged; choose another run.name"
            )
        return None

    def newest_world_size(self) -> int:
        """Return how many ranks saved the newest checkpoint, 0 where there is none; every rank must call this.

        Raises:
            UserError: no checkpoint's manifest can be read.
        """
        newest = self.newest() if dist.get_rank() == 0 else None
        return _broadcast(newest.world_size if newest else 0)

    def _read(self, step: int) -> CheckpointManifest:
        manifest = read_manifest(self._storage, self.uri(step))
        if (manifest.run, manifest.state.step) != (self._config.run.name, step):
            raise DamagedCheckpointError(
                f"checkpoint {self.uri(step)}: its {MANIFEST_NAME} is of run {manifest.run}, step {manifest.state.step}"
            )
        return manifest

    def upload(self, engine: Engine, step: int) -> None:
        """Copy this rank's part of the state and upload it asynchronously; every rank must call this.

        One checkpoint is under way at a time, so that no more than one copy is held: the one before is waited for.
        """
        self.wait()
        if not self._attempt:
            self._attempt = _broadcast(uuid.uuid4().hex[:12])
        self._begin(self._upload_part, step, dist.get_rank(), engine.snapshot(), _random_state())

    def publish(self, state: TrainingState) -> None:
        """Publish the checkpoint that is uploaded, with this state, as soon as all ranks' parts are there."""
        if dist.get_rank() == 0:
            self._begin(self._publish, state.model_copy(deep=True), dist.get_world_size())

    def wait(self) -> None:
        """Wait until this rank has done what it began; rank 0 has then published.

        Raises:
            UserError: the store or the disk failed, or another process has taken the run over.
        """
        begun, self._begun = self._begun, []
        for work in begun:
            work.result()

    def raise_failure(self) -> None:
        """Raise an error of this rank's asynchronous work so far, without waiting."""
        for work in self._begun:
            if work.done():
                work.result()

    def _begin(self, function: Callable[..., None], *arguments: Any) -> None:
        self._begun.append(self._thread.submit(function, *arguments))

    def _upload_part(self, step: int, rank: int, snapshot: Snapshot, random_state: dict[str, torch.Tensor]) -> None:
        """Write one rank's files, and last the list of them."""
        folder = private_folder(self._scratch / f"{self._attempt}-{rank}" / "state")
        try:
            with explained("write the checkpoint to", str(folder)):
                snapshot.write(folder)
                (folder / f"random-{rank}.safetensors").write_bytes(save(random_state))
            files: list[CheckpointFile] = []
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                if self._is_abandoned.is_set():
                    return
                name = path.relative_to(folder).as_posix()
                self._storage.upload(path, join(self._files(step), name))
                files.append(CheckpointFile(path=name, num_bytes=path.stat().st_size, sha256=sha256_of(path), rank=rank))
        finally:
            shutil.rmtree(folder.parent)
        self._storage.write_bytes(self._part(step, rank), _FILES.dump_json(files))

    def _publish(self, state: TrainingState, world_size: int) -> None:
        """Write the manifest when all parts are there, once; remove what it makes superfluous."""
        parts = [self._wait_for_part(state.step, rank) for rank in range(world_size)]
        if self._is_abandoned.is_set():
            return
        files = [file for part in parts for file in part]
        uri = self.uri(state.step)
        sizes = {found.uri: found.num_bytes for found in self._storage.list(self._files(state.step))}
        for file in files:
            if sizes.get(join(self._files(state.step), file.path)) != file.num_bytes:
                raise StoreError(f"checkpoint {uri}: {file.path} did not arrive in the store as it was sent; start again later")
        self._owner.check()
        manifest = self._manifest(state, world_size, files)
        if not self._storage.create(join(uri, MANIFEST_NAME), manifest.sealed()):
            self._replace_earlier_one(uri, manifest)
        own = [step for step in self.steps() if step <= state.step]  # what is later is another owner's
        for step in superfluous_steps(own, state.best_step, self._config.checkpoint.keep_last):
            self._remove(step)

    def _replace_earlier_one(self, uri: str, manifest: CheckpointManifest) -> None:
        """Replace what was published before the epoch's validation, or late by a dead attempt or an earlier owner.

        Raises:
            SupersededError: a later owner has published.
        """
        if read_manifest(self._storage, uri).token > self._owner.token:
            raise SupersededError(f"run.name = {self._config.run.name}: another process has published {uri}; is the run submitted twice?")
        self._storage.write_bytes(join(uri, MANIFEST_NAME), manifest.sealed())

    def _wait_for_part(self, step: int, rank: int) -> list[CheckpointFile]:
        """Wait for another rank; a rank that died ends the whole group, and this with it."""
        part = self._part(step, rank)
        while not self._storage.exists(part):
            if self._is_abandoned.wait(_POLL_SECONDS):
                return []
        return _FILES.validate_json(self._storage.read_bytes(part))

    def _files(self, step: int) -> str:
        return join(self.uri(step), f"files-{self._attempt}")

    def _part(self, step: int, rank: int) -> str:
        return join(self._files(step), f"part-{rank}.json")

    def load_newest(self, engine: Engine) -> CheckpointManifest | None:
        """Load the newest checkpoint that is whole into the engine and the random generators; None where the run has none.

        Every rank must call this. Checkpoints that are found damaged, and what attempts that died have left, are removed.

        Raises:
            UserError: the newest is of something else, or all are damaged.
        """
        rank = dist.get_rank()
        for left in self._scratch.glob(f"*-{rank}"):  # by attempts of this rank that died
            shutil.rmtree(left)
        damaged: list[str] = []
        for step in _broadcast(self.steps()[::-1] if rank == 0 else []):
            manifest, problem = _broadcast(self._offer(step) if rank == 0 else (None, ""))
            if manifest is not None:
                problem = self._load(engine, manifest, rank)
            if not problem:
                if rank == 0:
                    self._owner.check()
                    self._remove_after(step)
                return manifest
            damaged.append(problem)
            if rank == 0:
                logger.warning("%s; going on from an older checkpoint", problem)
        if damaged:
            raise UserError(f"run.name = {self._config.run.name}: no checkpoint is whole ({'; '.join(damaged)}); choose another run.name")
        if rank == 0:
            self._remove_after(-1)
        return None

    def _offer(self, step: int) -> tuple[CheckpointManifest | None, str]:
        """Find out whether a checkpoint can be loaded, in a form that this number of ranks can load; or tell what is wrong with it."""
        try:
            manifest = self._read(step)
            self.check_compatible(manifest)
            if needs_conversion(manifest, dist.get_world_size()):
                offer_universal(self._storage, self.uri(step), manifest, self._universal(manifest))
        except DamagedCheckpointError as error:
            return None, str(error)
        return manifest, ""

    def _load(self, engine: Engine, manifest: CheckpointManifest, rank: int) -> str:
        """Load a checkpoint on every rank; or, before any has begun to, tell what is wrong with it."""
        step, is_universal = manifest.state.step, needs_conversion(manifest, dist.get_world_size())
        folder = self._universal(manifest) if is_universal else private_folder(self._scratch / f"load-{step}-{rank}")
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, self._fetch(manifest, folder, None if is_universal else rank))
        problem = next(filter(None, problems), "")
        if not problem:
            engine.load(folder, is_universal)
            if manifest.world_size == dist.get_world_size():
                _restore_random_state(load_file(folder / f"random-{rank}.safetensors"))
            else:  # there is no state to resume from, but the same change of workers shall give the same run
                torch.manual_seed(int(np.random.SeedSequence((self._config.training.seed, step, rank)).generate_state(1, np.uint64)[0]))
            dist.barrier()
        shutil.rmtree(folder, ignore_errors=is_universal)  # which all ranks of a node share
        return problem

    def _fetch(self, manifest: CheckpointManifest, folder: Path, rank: int | None) -> str:
        """Get what one rank needs of a checkpoint, or of its universal form; or tell what is wrong with it."""
        uri = self.uri(manifest.state.step)
        try:
            if rank is None:
                fetch_universal(self._storage, uri, manifest, folder)
            else:
                fetch_files(self._storage, uri, manifest, folder, rank)
        except DamagedCheckpointError as error:
            return str(error)
        return ""

    def _universal(self, manifest: CheckpointManifest) -> Path:
        return self._scratch / f"universal-{manifest.attempt}-{manifest.state.step}.node"

    def _remove_after(self, step: int) -> None:
        """Remove all that is newer than a checkpoint, and what attempts that died have left beside it."""
        published = self.steps()
        for number in steps_in(found.uri for found in self._storage.list(self._uri)):
            if number > step or number not in published:
                self._remove(number)

    def _remove(self, step: int) -> None:
        self._storage.delete(join(self.uri(step), MANIFEST_NAME))  # first, so that no reader sees what is being removed
        self._storage.delete_tree(self.uri(step))

    def check_compatible(self, manifest: CheckpointManifest) -> None:
        """Refuse to resume from a checkpoint of another config or dataset.

        Raises:
            UserError: the config or the dataset differs, by name.
        """
        run = self._config.run.name
        advice = "set it back or choose another run.name"
        differences = config_differences(manifest.config, self._config.model_dump(mode="json"))
        if differences:
            raise UserError(f"run.name = {run}: its checkpoint has other values ({'; '.join(differences)}); {advice}")
        if manifest.dataset_fingerprint != self._dataset.manifest.fingerprint:
            raise UserError(f"data.dataset = {self._dataset.uri}: run {run} was trained on {manifest.dataset}; {advice}")

    def _manifest(self, state: TrainingState, world_size: int, files: list[CheckpointFile]) -> CheckpointManifest:
        return CheckpointManifest(
            run=self._config.run.name,
            token=self._owner.token,
            state=state,
            world_size=world_size,
            zero_stage=self._config.training.zero_stage,
            dataset=self._dataset.uri,
            dataset_fingerprint=self._dataset.manifest.fingerprint,
            config=self._config.model_dump(mode="json"),
            code_version=__version__,
            attempt=self._attempt,
            files=tuple(files),
        )


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _broadcast(value: T) -> T:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
