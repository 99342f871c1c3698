"""The checkpoints of one run: written asynchronously, published by a manifest, and loaded on resume."""

import hashlib
import logging
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from safetensors.torch import load_file, save

from recsys import __version__
from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import StoreError, UserError
from recsys.store import Storage, join, private_folder
from recsys.store.errors import explained
from recsys.train.checkpoints.lease import Lease, SupersededError
from recsys.train.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointFile,
    CheckpointManifest,
    DamagedCheckpointError,
    config_differences,
    fetch_files,
    published_steps,
    read_manifest,
    steps_in,
)
from recsys.train.checkpoints.resharding import fetch_universal, needs_conversion, offer_universal
from recsys.train.engine import Engine
from recsys.train.host_copies import write_files
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_FILES = TypeAdapter(list[CheckpointFile])


class CheckpointStore:
    """The checkpoints of one run. As a context manager it waits on exit for pending work, at most `GRACE_SECONDS` if the block raised."""

    def __init__(self, storage: Storage, config: Config, dataset: Dataset, token: int = 0) -> None:
        self._storage, self._config, self._dataset = storage, config, dataset
        self._lease = Lease(storage, config.run.name, token)
        self._uri = storage.uri("runs", config.run.name, "checkpoints")
        self._scratch = Path(config.run.scratch) / "checkpoints" / hashlib.sha256(self._uri.encode()).hexdigest()[:12]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: list[Future[None]] = []
        self._is_abandoned = threading.Event()
        self._attempt = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.wait()
        wait(self._begun, GRACE_SECONDS)  # with a timeout: another rank's part may never come
        self._is_abandoned.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def uri(self, step: int) -> str:
        """Return the URI of a step's checkpoint."""
        return join(self._uri, f"step-{step:08d}")

    def steps(self) -> list[int]:
        """Return the steps that have a published checkpoint, oldest first."""
        return published_steps(self._storage, self._config.run.name)

    def newest(self) -> CheckpointManifest | None:
        """Return the newest readable manifest, None if the run has no checkpoint; raise a UserError if all manifests are damaged."""
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
        """Return the number of ranks that saved the newest checkpoint, 0 if there is none. Every rank must call this."""
        newest = self.newest() if dist.get_rank() == 0 else None
        return _broadcast(newest.world_size if newest else 0)

    def _read(self, step: int) -> CheckpointManifest:
        manifest = read_manifest(self._storage, self.uri(step))
        if (manifest.run, manifest.state.step) != (self._config.run.name, step):
            raise DamagedCheckpointError(
                f"checkpoint {self.uri(step)}: its {MANIFEST_NAME} is of run {manifest.run}, step {manifest.state.step}"
            )
        return manifest

    def check_compatible(self, manifest: CheckpointManifest) -> None:
        """Raise a UserError that names the difference if a checkpoint has another config or dataset."""
        run, advice = self._config.run.name, "set it back or choose another run.name"
        differences = config_differences(manifest.config, self._config.model_dump(mode="json"))
        if differences:
            raise UserError(f"run.name = {run}: its checkpoint has other values ({'; '.join(differences)}); {advice}")
        if manifest.dataset_fingerprint != self._dataset.manifest.fingerprint:
            raise UserError(f"data.dataset = {self._dataset.uri}: run {run} was trained on {manifest.dataset}; {advice}")

    def upload(self, engine: Engine, step: int) -> None:
        """Copy this rank's part of the state and upload it asynchronously. Every rank must call this.

        Waits for the previous checkpoint first, so that at most one copy is held.
        """
        self.wait()
        if not self._attempt:
            self._attempt = _broadcast(uuid.uuid4().hex[:12])
        self._begun.append(self._thread.submit(self._upload_part, step, dist.get_rank(), engine.snapshot(), _random_state()))

    def publish(self, state: TrainingState) -> None:
        """Publish the uploaded checkpoint with this state, asynchronously on rank 0, as soon as all ranks' parts are complete."""
        if dist.get_rank() == 0:
            self._begun.append(self._thread.submit(self._publish, state.model_copy(deep=True), dist.get_world_size()))

    def wait(self) -> None:
        """Wait for this rank's pending work and raise its error; on rank 0 the checkpoint is then published."""
        begun, self._begun = self._begun, []
        for work in begun:
            work.result()

    def raise_failure(self) -> None:
        """Raise an error of this rank's finished asynchronous work, without waiting."""
        for work in self._begun:
            if work.done():
                work.result()

    def _upload_part(self, step: int, rank: int, snapshot: dict[str, Any], random_state: dict[str, torch.Tensor]) -> None:
        """Write one rank's files, and the list of them last."""
        folder = private_folder(self._scratch / f"{self._attempt}-{rank}" / "state")
        try:
            with explained("write the checkpoint to", str(folder)):
                write_files(snapshot, folder)
                (folder / f"random-{rank}.safetensors").write_bytes(save(random_state))
            files: list[CheckpointFile] = []
            for path in sorted(filter(Path.is_file, folder.rglob("*"))):
                if self._is_abandoned.is_set():
                    return
                files.append(CheckpointFile.of(path, folder, rank))
                self._storage.upload(path, join(self._files(step), files[-1].path))
        finally:
            shutil.rmtree(folder.parent)
        self._storage.write_bytes(self._part(step, rank), _FILES.dump_json(files))

    def _publish(self, state: TrainingState, world_size: int) -> None:
        """Write the manifest when all parts are complete, then delete checkpoints that are no longer kept."""
        files = [file for rank in range(world_size) for file in self._wait_for_part(state.step, rank)]
        if self._is_abandoned.is_set():
            return
        uri = self.uri(state.step)
        sizes = {found.uri: found.num_bytes for found in self._storage.list(self._files(state.step))}
        for file in files:
            if sizes.get(join(self._files(state.step), file.path)) != file.num_bytes:
                raise StoreError(f"checkpoint {uri}: {file.path} arrived damaged in the store; start again later")
        self._lease.check()
        manifest = self._manifest(state, world_size, files)
        if not self._storage.create(join(uri, MANIFEST_NAME), manifest.sealed()):
            # Already published: before the epoch's validation, or late by a dead attempt or another owner.
            if read_manifest(self._storage, uri).token > self._lease.token:
                raise SupersededError(f"run.name = {manifest.run}: another process has published {uri}; is the run submitted twice?")
            self._storage.write_bytes(join(uri, MANIFEST_NAME), manifest.sealed())
        own = [step for step in self.steps() if step <= state.step]  # later steps belong to another owner
        for step in superfluous_steps(own, state.best_step, self._config.checkpoint.keep_last):
            self._remove(step)

    def _wait_for_part(self, step: int, rank: int) -> list[CheckpointFile]:
        """Wait for a rank's part and return its files. If a rank dies, the whole group ends, and this wait with it."""
        part = self._part(step, rank)
        while not self._storage.exists(part):
            if self._is_abandoned.wait(_POLL_SECONDS):
                return []
        return _FILES.validate_json(self._storage.read_bytes(part))

    def _files(self, step: int) -> str:
        return join(self.uri(step), f"files-{self._attempt}")

    def _part(self, step: int, rank: int) -> str:
        return join(self._files(step), f"part-{rank}.json")

    def _manifest(self, state: TrainingState, world_size: int, files: list[CheckpointFile]) -> CheckpointManifest:
        return CheckpointManifest(
            run=self._config.run.name,
            token=self._lease.token,
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

    def load_newest(self, engine: Engine) -> CheckpointManifest | None:
        """Load the newest intact checkpoint into the engine and the random generators; return None if the run has none.

        Every rank must call this. It deletes damaged checkpoints that are newer, and files of dead attempts.

        Raises:
            UserError: the newest has another config or dataset, or all are damaged.
        """
        rank = dist.get_rank()
        for left in self._scratch.glob(f"*-{rank}"):  # by dead attempts of this rank
            shutil.rmtree(left)
        loaded, problems = None, list[str]()
        for step in _broadcast(self.steps()[::-1] if rank == 0 else []):
            try:
                loaded = self._load(engine, step)
                break
            except DamagedCheckpointError as error:
                problems.append(str(error))
                if rank == 0:
                    logger.warning("%s; continuing from an older checkpoint", error)
        if problems and loaded is None:
            raise UserError(
                f"run.name = {self._config.run.name}: no checkpoint is complete ({'; '.join(problems)}); choose another run.name"
            )
        if rank == 0:
            self._lease.check()
            self._remove_after(loaded.state.step if loaded else -1)
        return loaded

    def _load(self, engine: Engine, step: int) -> CheckpointManifest:
        """Load a checkpoint on every rank. Damage found by one rank is raised on every rank before any of them starts to load."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        with _raised_on_every_rank():
            offered = self._offer(step) if rank == 0 else None
        manifest = _broadcast(cast(CheckpointManifest, offered))
        is_universal = needs_conversion(manifest, world_size)
        folder = self._universal(manifest) if is_universal else private_folder(self._scratch / f"load-{step}-{rank}")
        try:
            with _raised_on_every_rank():
                if is_universal:
                    fetch_universal(self._storage, self.uri(step), manifest, folder)
                else:
                    fetch_files(self._storage, self.uri(step), manifest, folder, rank)
            engine.load(folder, is_universal)
            if manifest.world_size == world_size:
                _restore_random_state(load_file(folder / f"random-{rank}.safetensors"))
            else:  # no saved state, but the same change of workers must be reproducible
                seeds = (self._config.training.seed, step, rank)
                torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))
            dist.barrier()
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # all ranks of a node share the universal form
        return manifest

    def _offer(self, step: int) -> CheckpointManifest:
        """Check that a checkpoint belongs to this run; convert it if this number of ranks cannot load it. Called only on rank 0."""
        manifest = self._read(step)
        self.check_compatible(manifest)
        if needs_conversion(manifest, dist.get_world_size()):
            offer_universal(self._storage, self.uri(step), manifest, self._universal(manifest))
        return manifest

    def _universal(self, manifest: CheckpointManifest) -> Path:
        return self._scratch / f"universal-{manifest.attempt}-{manifest.state.step}.node"

    def _remove_after(self, step: int) -> None:
        """Delete everything newer than a checkpoint, and unpublished files of dead attempts."""
        published = self.steps()
        for number in steps_in(found.uri for found in self._storage.list(self._uri)):
            if number > step or number not in published:
                self._remove(number)

    def _remove(self, step: int) -> None:
        self._storage.delete(join(self.uri(step), MANIFEST_NAME))  # first, so that no reader uses a partly deleted checkpoint
        self._storage.delete_tree(self.uri(step))


def superfluous_steps(steps: Iterable[int], best_step: int | None, keep_last: int) -> list[int]:
    """Return the checkpoints to delete: all except the last `keep_last` and the best."""
    return [step for step in sorted(steps)[:-keep_last] if step != best_step]


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _broadcast(value: T) -> T:
    """Return rank 0's value. Every rank must call this."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def _raised_on_every_rank() -> Iterator[None]:
    """Raise damage found in the block by any rank on every rank. Every rank must call this."""
    problems: list[str] = [""] * dist.get_world_size()
    problem = ""
    try:
        yield
    except DamagedCheckpointError as error:
        problem = str(error)
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise DamagedCheckpointError(next(filter(None, problems)))
