"""Begins a run with the weights of a checkpoint or export (`training.start_from`), its tables matched row by row by name.

`TABLES` says which vocabulary names the rows of which parameter, and `vocabularies` what the names are. Other parameters are copied if
name and shape are equal. What cannot be carried over keeps its initial value. The functions
above `begin` are without I/O.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys.arrays import Integers
from recsys.config import Config
from recsys.data.batch import has_start
from recsys.data.items import CatalogueSource
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.data.node_files import shared_entry
from recsys.errors import UserError
from recsys.exports.registry import ExportManifest, Registry
from recsys.model.item_encoder import PRESENCE
from recsys.schema import ITEM_ID
from recsys.store import Storage, join
from recsys.train.checkpoints.manifest import MANIFEST_NAME, fetch_files, read_manifest
from recsys.train.checkpoints.start_address import check_width, export_at
from recsys.train.engine import consolidate, read_moments

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20
"""Maximum number of parameters that the log names for each reason why they are not carried over."""


class Table(NamedTuple):
    """The parameters whose names match `parameters`; their entries along `axis` are named by `vocabulary`."""

    parameters: str
    axis: int
    vocabulary: str


TABLES = (
    Table("item_encoder.sources.id.weight", 0, "items"),
    Table("item_encoder.sources.categories.weight", 0, "categories"),
    Table("item_encoder.sources.numbers.linear.weight", 1, "numbers"),
    Table("item_encoder.gates.*", 0, "sources"),
    Table("user_encoder.event.weight", 0, "kinds"),
    Table("user_encoder.position.weight", 0, "places"),
    Table("user_encoder.profile.categories.weight", 0, "profile categories"),
    Table("user_encoder.profile.numbers.weight", 1, "profile numbers"),
    Table("user_encoder.context.values.weight", 0, "contexts"),
    Table("user_encoder.blocks.*.attention.distance_bias", 1, "distances"),
    Table("ranker.heads.weight", 0, "tasks"),
    Table("ranker.biases.*", 0, "tasks"),
    Table("ranker.gate_*", 0, "tasks"),
    Table("ranker.mixture.*", 0, "mixtures"),
    Table("ranker.scale", 0, "tasks"),
    Table("ranker.shift", 0, "tasks"),
    Table("ranker.display_bias", 1, "tasks"),
    Table("task_losses.log_variances", 0, "tasks"),
)
"""A parameter belongs to the first table that matches it."""

Rows = Mapping[str, Integers | None]
"""Per vocabulary, for each name of the new model the row that it has in the source, or -1; None if rows cannot be told apart."""


def vocabularies(config: Config, manifest: DatasetManifest, parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of every vocabulary except `items`, in the order of the rows, of a model with these `parameters`."""
    tasks = [f"{task.name} {task.kind}" for task in manifest.tasks] or [""]  # without tasks the ranker has one output, which is not trained
    profiles, starts = manifest.profiles, has_start(config.model, manifest)
    num_places = config.data.max_history + config.model.has_queries + starts + manifest.has_exposures
    sources = {name.split(".")[2] for name in parameters if name.startswith("item_encoder.sources.")}
    return {
        "categories": ["", *manifest.category_vocabulary],
        "numbers": [f"{part} {name}" for part in ("value", "presence") for name in manifest.number_columns],
        "sources": [name for name in PRESENCE if name in sources],
        "kinds": ["", *manifest.event_kinds],
        "places": ["start"] * starts + [str(place) for place in range(num_places - starts)],
        "profile categories": ["", *profiles.vocabulary],
        "profile numbers": [f"{part} {name}" for part in ("value", "presence") for name in profiles.number_names],
        "contexts": list(manifest.contexts.names),
        "distances": [str(distance) for distance in range(num_places)],
        "tasks": tasks,
        "mixtures": [f"{expert} {task}" for expert in range(config.model.ranker.num_experts) for task in tasks],
    }


def matched_rows(old: pa.ChunkedArray | Sequence[str], new: pa.ChunkedArray | Sequence[str]) -> Integers:
    """Return for each name of `new` its place in `old`, or -1. Names that begin as `old` does are not looked up."""
    old, new = (names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names], pa.string()) for names in (old, new))
    if new.slice(0, len(old)).equals(old):
        return np.append(np.arange(len(old)), np.full(len(new) - len(old), -1))
    return np.asarray(pc.index_in(new, value_set=old).fill_null(-1).to_numpy(), np.int64)


def id_rows(old: Config, new: Config, num_old: int, items: Integers) -> Integers | None:
    """Return the rows of the id table for matched `items`, row 0 (padding) included; None for ids hashed by other indices."""
    hashes = [(config.model.id_buckets, config.model.id_hashes) for config in (old, new) if config.model.id_buckets]
    if not hashes:
        return np.append(0, np.where(items >= 0, items + 1, -1))
    are_indices_kept = len(items) >= num_old and np.array_equal(items[:num_old], np.arange(num_old))
    return np.arange(hashes[0][0]) if are_indices_kept and hashes[1:] == hashes[:1] else None


def carried(name: str, found: Tensor | None, fresh: Tensor, rows: Rows) -> Tensor | str:
    """Return a parameter with the values that the source has of it, or why it has none."""
    table = next((table for table in TABLES if fnmatchcase(name, table.parameters)), None)
    if found is None:
        return "not in the source"
    if table is None:
        return found if found.shape == fresh.shape else "of another shape"
    matched = rows[table.vocabulary]
    if matched is None:
        return "of ids hashed by other catalogue indices"
    if not _is_fitting(table.axis, matched, found, fresh):
        return "of another shape"
    places = np.flatnonzero(matched >= 0)
    if not len(places):
        return "without a row of the same name"
    taken = found.index_select(table.axis, torch.from_numpy(matched[places]))
    return fresh.index_copy(table.axis, torch.from_numpy(places), taken.to(fresh))


def _is_fitting(axis: int, matched: Integers, found: Tensor, fresh: Tensor) -> bool:
    if found.dim() != fresh.dim() or len(matched) != fresh.shape[axis] or matched.max(initial=-1) >= found.shape[axis]:
        return False
    return all(found.shape[other] == fresh.shape[other] for other in range(fresh.dim()) if other != axis)


def carry(weights: Mapping[str, Tensor], module: nn.Module, rows: Rows) -> dict[str, list[str]]:
    """Copy weights into the module in place; return the names of the parameters that stay as they are, by reason."""
    fresh: dict[str, list[str]] = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = carried(name, weights.get(name), parameter, rows)
            if isinstance(values, str):
                fresh.setdefault(values, []).append(name)
            else:
                parameter.copy_(values)
    return fresh


@dataclass(frozen=True)
class Moments:
    """The optimizer's state in the source, after `step` steps, for the parameters of the new model (`shapes`)."""

    step: float
    saved: Mapping[str, Mapping[str, Tensor]]
    rows: Rows
    shapes: Mapping[str, torch.Size]

    def of(self, name: str, key: str) -> Tensor:
        """Return a parameter's moment `key`, zero where the source has none."""
        zeros = torch.zeros(self.shapes[name])
        values = carried(name, self.saved[key].get(name), zeros, self.rows)
        return zeros if isinstance(values, str) else values


def begin(module: nn.Module, config: Config, dataset: Dataset) -> Moments | None:
    """Begin with the weights in `training.start_from`; return the optimizer's state if it is kept. Every rank must call this.

    Raises:
        UserError: there are no such weights, or none of them fits the module.
    """
    key, source = f"training.start_from = {config.training.start_from}", _fetch(config, dataset)
    saved_config, manifest = Config.model_validate_json(source["config"]), DatasetManifest.model_validate_json(source["manifest"])
    check_width(key, saved_config.model_dump(), config)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    old, new = vocabularies(saved_config, manifest, source["weights"]), vocabularies(config, dataset.manifest, shapes)
    rows: dict[str, Integers | None] = {name: matched_rows(old[name], new[name]) for name in new}
    rows["items"] = id_rows(saved_config, config, manifest.num_items, source["items"].numpy())
    fresh = carry(source["weights"], module, rows)
    num_carried = len(shapes) - sum(map(len, fresh.values()))
    if not num_carried:
        raise UserError(f"{key}: none of its weights fits this model; give a checkpoint or export of a model with the same section model")
    if dist.get_rank() == 0:
        line = "; ".join([f"{num_carried} of {len(shapes)} parameters", *(_shown(*entry) for entry in fresh.items())])
        logger.info("run %s starts from %s: %s", config.run.name, config.training.start_from, line)
    return Moments(source["step"], source["moments"], rows, shapes) if config.training.keep_optimizer else None


def _shown(reason: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"new, since {reason}: {', '.join(names[:NAMES_SHOWN])}{more}"


def _fetch(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return the source's config, dataset manifest, weights and optimizer's state, and matched items; read once per node."""
    storage, uri = dataset.storage, config.training.start_from
    export = export_at(storage, uri)
    if export is None:
        read_manifest(storage, uri)  # raises a readable error
    key = (storage.read_bytes(join(uri, MANIFEST_NAME)), dataset.manifest.fingerprint, config.training.keep_optimizer)
    folder = Path(config.run.scratch) / "starts" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def build(new: Path) -> None:
        parts, catalogue = _of_checkpoint(storage, config, new) if export is None else _of_export(*export, new)
        items = matched_rows(_item_ids(catalogue), _item_ids(CatalogueSource.of_dataset(dataset)))
        torch.save(parts | {"items": torch.from_numpy(items)}, new / "start.pt")
        for path in filter(Path.is_dir, new.iterdir()):  # what was downloaded, and is mapped until here
            shutil.rmtree(path)

    with shared_entry(folder, build):
        source: dict[str, Any] = torch.load(folder / "start.pt", map_location="cpu", mmap=True, weights_only=True)
    return source


def _item_ids(catalogue: CatalogueSource) -> pa.ChunkedArray:
    return pa.concat_tables(part.select([ITEM_ID]) for part in catalogue.sorted_rows([ITEM_ID]))[ITEM_ID]


def _of_checkpoint(storage: Storage, config: Config, folder: Path) -> tuple[dict[str, Any], CatalogueSource]:
    """Return a checkpoint's part of the source, and the catalogue that it was trained on."""
    uri, training = config.training.start_from, config.training
    checkpoint = read_manifest(storage, uri)
    trained_on = Dataset.open(storage, checkpoint.dataset, f"training.start_from = {uri}: its data.dataset")
    fetch_files(storage, uri, checkpoint, folder / "saved")
    weights = consolidate(folder / "saved", training.use_gpu)
    moments, step = read_moments(folder / "saved", folder / "universal", weights) if training.keep_optimizer else ({}, 0.0)
    texts = {"config": json.dumps(checkpoint.config), "manifest": trained_on.manifest.model_dump_json()}
    return texts | {"weights": weights, "moments": moments, "step": step}, CatalogueSource.of_dataset(trained_on)


def _of_export(registry: Registry, export: ExportManifest, folder: Path) -> tuple[dict[str, Any], CatalogueSource]:
    """Return an export's part of the source, and its catalogue."""
    files = registry.fetch(export.version, folder, ("config.json", "dataset.json", "catalogue.parquet", "model.safetensors"))
    texts = {"config": (files / "config.json").read_text("utf-8"), "manifest": (files / "dataset.json").read_text("utf-8")}
    return texts | {"weights": load_file(files / "model.safetensors")}, CatalogueSource([(None, str(files / "catalogue.parquet"))])
