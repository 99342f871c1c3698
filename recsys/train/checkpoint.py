"""Checkpoints: a rank-sharded state under a manifest that is published last; what is inside the state is the engine's part.

Layout: `runs/{run}/checkpoints/step-{step}/{manifest.json, files-{attempt}/...}`. Readers believe manifests only: an
attempt that died leaves files that nobody reads, and the next save of that step removes them.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from recsys import __version__
from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.model.queries import query_encoder_of
from recsys.model.recommender import Recommender, build_recommender
from recsys.predictor import Predictor, encode_with_text
from recsys.storage import Storage, join, private_folder, sha256_of
from recsys.train.engine import Engine, consolidate
from recsys.train.state import TrainingState

MANIFEST_NAME = "manifest.json"
MAY_CHANGE = ("storage.", "run.", "checkpoint.", "search.", "export.", "service.")
MAY_CHANGE_KEYS = (
    "training.num_workers",
    "training.micro_batch_size",
    "data.dataset",
    "data.source",
    "data.base",
    "data.folder",
    "data.events",
    "data.items",
    "data.users",
    "evaluation.checkpoint",
    "evaluation.compare",
    "evaluation.curve",
    "evaluation.baselines",
    "evaluation.baseline_epochs",
    "evaluation.fairness_attributes",
    "evaluation.diversity",
    "evaluation.diversity_method",
    "evaluation.split",
    "evaluation.cutoffs",
    "evaluation.batch_size",
    "training.epochs",
    "training.max_steps",
    "training.early_stopping_patience",
    "training.max_failures",
    "training.log_every_seconds",
    "training.cpus_per_worker",
)

logger = logging.getLogger(__name__)


class CheckpointFile(BaseModel):
    """One file of a checkpoint; `path` is relative to the attempt's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    num_bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """What a checkpoint is of, and the files that it has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    state: TrainingState
    world_size: int
    zero_stage: int
    dataset: str
    dataset_fingerprint: str
    config: dict[str, Any]
    code_version: str
    attempt: str
    files: tuple[CheckpointFile, ...]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, storage: Storage, config: Config, dataset: Dataset) -> None:
        self._storage = storage
        self._config = config
        self._dataset = dataset
        self._uri = storage.uri("runs", config.run.name, "checkpoints")
        self._scratch = Path(config.run.scratch) / "checkpoints" / config.run.name

    def uri(self, step: int) -> str:
        """Return the address of the checkpoint of a step."""
        return join(self._uri, f"step-{step:08d}")

    def steps(self) -> list[int]:
        """List the steps that have a published checkpoint, oldest first."""
        names = [stored.uri.split("/")[-2] for stored in self._storage.list(self._uri) if stored.uri.endswith(f"/{MANIFEST_NAME}")]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def newest(self) -> CheckpointManifest | None:
        """Return the manifest of the last checkpoint."""
        steps = self.steps()
        return read_manifest(self._storage, self.uri(steps[-1])) if steps else None

    def save(self, engine: Engine, state: TrainingState) -> str:
        """Publish a checkpoint of this step; every rank must call this. Returns its URI."""
        uri, rank = self.uri(state.step), dist.get_rank()
        attempt = _broadcast(self._begin_attempt(uri) if rank == 0 else "")
        if not attempt:
            return uri
        folder = private_folder(self._scratch / f"{attempt}-{rank}" / "state")
        engine.save(folder)
        save_file(_random_state(), folder / f"random-{rank}.safetensors")
        files: list[CheckpointFile] = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            self._storage.upload(path, join(uri, f"files-{attempt}", name))
            files.append(CheckpointFile(path=name, num_bytes=path.stat().st_size, sha256=sha256_of(path)))
        shutil.rmtree(folder.parent, ignore_errors=True)
        gathered: list[list[CheckpointFile]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, files)
        if rank == 0:
            manifest = self._manifest(state, attempt, [file for part in gathered for file in part])
            self._storage.create(join(uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
            self._prune(state)
        dist.barrier()
        return uri

    def _begin_attempt(self, uri: str) -> str:
        """Remove what an attempt that died has left, and name a new one; empty where the checkpoint is published already."""
        if self._storage.exists(join(uri, MANIFEST_NAME)):
            return ""
        self._storage.delete_tree(uri)
        return uuid.uuid4().hex[:12]

    def load(self, engine: Engine, manifest: CheckpointManifest) -> TrainingState:
        """Load a checkpoint into the engine and the random generators; every rank must call this.

        Raises:
            UserError: the checkpoint is of something else, or a file is damaged.
        """
        self.check_compatible(manifest)
        rank = dist.get_rank()
        folder = private_folder(self._scratch / f"load-{manifest.attempt}-{rank}")
        fetch_files(self._storage, self.uri(manifest.state.step), manifest, folder)
        engine.load(folder)
        _restore_random_state(load_file(folder / f"random-{rank}.safetensors"))
        shutil.rmtree(folder)
        return manifest.state.model_copy()

    def check_compatible(self, manifest: CheckpointManifest) -> None:
        """Refuse to go on from a checkpoint of something else.

        Raises:
            UserError: the config, the dataset or the number of workers differs, by name.
        """
        run, workers = self._config.run.name, self._config.training.num_workers
        advice = "set it back or choose another run.name"
        differences = config_differences(manifest.config, self._config.model_dump(mode="json"))
        if differences:
            raise UserError(f"run.name = {run}: its checkpoint has other values ({'; '.join(differences)}); {advice}")
        if manifest.dataset_fingerprint != self._dataset.manifest.fingerprint:
            raise UserError(f"data.dataset = {self._dataset.uri}: run {run} was trained on {manifest.dataset}; {advice}")
        if manifest.world_size != workers:
            raise UserError(f"training.num_workers = {workers}: run {run} was saved by {manifest.world_size} workers; {advice}")

    def _manifest(self, state: TrainingState, attempt: str, files: list[CheckpointFile]) -> CheckpointManifest:
        return CheckpointManifest(
            run=self._config.run.name,
            state=state,
            world_size=dist.get_world_size(),
            zero_stage=self._config.training.zero_stage,
            dataset=self._dataset.uri,
            dataset_fingerprint=self._dataset.manifest.fingerprint,
            config=self._config.model_dump(mode="json"),
            code_version=__version__,
            attempt=attempt,
            files=tuple(files),
        )

    def _prune(self, state: TrainingState) -> None:
        for step in superfluous_steps(self.steps(), state.best_step, self._config.checkpoint.keep_last):
            self._storage.delete(join(self.uri(step), MANIFEST_NAME))  # first, so that nobody reads what is being removed
            self._storage.delete_tree(self.uri(step))


def superfluous_steps(steps: Iterable[int], best_step: int | None, keep_last: int) -> list[int]:
    """Choose the checkpoints to delete: all but the last `keep_last` and the best."""
    return [step for step in sorted(steps)[:-keep_last] if step != best_step]


def config_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the keys whose values forbid a resume, as `key: saved -> current`."""
    before, after = dict(_leaves(saved)), dict(_leaves(current))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE) and key not in MAY_CHANGE_KEYS
    ]


def read_manifest(storage: Storage, uri: str) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: there is no checkpoint at `uri`.
    """
    if not uri or not storage.exists(join(uri, MANIFEST_NAME)):
        raise UserError(f"checkpoint = {uri or '(empty)'}: is no checkpoint; give the 'checkpoint' that python -m jobs.train printed")
    return CheckpointManifest.model_validate_json(storage.read_bytes(join(uri, MANIFEST_NAME)))


def fetch_files(storage: Storage, uri: str, manifest: CheckpointManifest, folder: Path) -> None:
    """Download a checkpoint's files and check them against the manifest.

    Raises:
        UserError: a file is missing or not what was saved; its name is in the message.
    """
    for file in manifest.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        address = join(uri, f"files-{manifest.attempt}", file.path)
        if not storage.exists(address):
            raise UserError(f"checkpoint {uri}: {file.path} is missing")
        storage.download(address, path)
        if path.stat().st_size != file.num_bytes or sha256_of(path) != file.sha256:
            raise UserError(f"checkpoint {uri}: {file.path} is damaged (its hash is not the manifest's)")


def load_trained(storage: Storage, uri: str, scratch: str) -> tuple[CheckpointManifest, Config, Dataset, Recommender]:
    """Load a checkpoint as a whole module on the CPU, saved by any number of workers at any ZeRO stage.

    Raises:
        UserError: there is no valid checkpoint at `uri`.
    """
    manifest = read_manifest(storage, uri)
    saved = Config.model_validate(manifest.config)
    config = saved.with_values({"run.scratch": scratch})
    dataset = Dataset.open(storage, manifest.dataset)
    recommender = build_recommender(config, dataset, torch.device("cpu"))
    folder = private_folder(Path(scratch) / "checkpoints" / f"whole-{manifest.attempt}")
    fetch_files(storage, uri, manifest, folder)
    recommender.load_state_dict(consolidate(folder))
    shutil.rmtree(folder)
    return manifest, config, dataset, recommender.eval()


def build_predictor(config: Config, dataset: Dataset, recommender: Recommender) -> Predictor:
    """Make a predictor of a trained module, its catalogue encoded anew."""
    vectors = encode_with_text(recommender.item_encoder, dataset.manifest.num_items, torch.device("cpu"))
    queries = query_encoder_of(config, dataset, recommender.item_encoder)
    return Predictor(config, dataset.manifest, recommender.catalogue, recommender.user_encoder, recommender.ranker, *vectors, queries)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _broadcast(text: str) -> str:
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
