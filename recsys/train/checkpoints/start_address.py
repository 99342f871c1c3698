"""Checks the address in `training.start_from` before any worker starts; imports no torch, so a wrong one is refused at once."""

import json
import re
from typing import Any

from recsys.config import Config
from recsys.errors import UserError
from recsys.exports.registry import MANIFEST_NAME, ExportManifest, Registry
from recsys.store import Storage, join


def export_at(storage: Storage, uri: str) -> tuple[Registry, ExportManifest] | None:
    """Return the export version at an address of this store; None for any other address.

    Raises:
        UserError: the address is one of a version that does not exist.
    """
    named = re.search(r"/exports/([^/]+)/versions/([^/]+)$", uri)
    registry = Registry(storage, named[1]) if named else None
    if named is None or registry is None or registry.uri(named[2]) != uri:
        return None
    return registry, registry.manifest(named[2])


def check_start(storage: Storage, config: Config) -> None:
    """Raise a UserError if `training.start_from` has no weights for this model. A run with checkpoints does not read it."""
    uri, key = config.training.start_from, f"training.start_from = {config.training.start_from}"
    of_run = storage.list(storage.uri("runs", config.run.name, "checkpoints")) if uri else []
    if not uri or any(found.uri.endswith(f"/{MANIFEST_NAME}") for found in of_run):
        return
    export = export_at(storage, uri)
    if export is not None:
        if config.training.keep_optimizer:
            raise UserError("training.keep_optimizer = true: an export has no optimizer state; set training.start_from to its checkpoint")
        check_width(key, json.loads(export[0].read(export[1], "config.json")), config)
        return
    try:
        manifest = json.loads(storage.read_bytes(join(uri, MANIFEST_NAME))) if storage.exists(join(uri, MANIFEST_NAME)) else {}
        saved, num_ranks = manifest["config"], manifest["world_size"]
    except (ValueError, LookupError, TypeError):
        raise UserError(
            f"{key}: is neither a checkpoint nor an export of this store; give the 'checkpoint' that python -m jobs.train printed, "
            "or the 'uri' of python -m jobs.export"
        ) from None
    if config.training.keep_optimizer and num_ranks and saved["training"]["zero_stage"] == 0:
        raise UserError(
            f"training.keep_optimizer = true: {uri} was trained with training.zero_stage = 0, which saves the optimizer's state without "
            "names; train it with 1 or higher, or set training.keep_optimizer=false"
        )
    check_width(key, saved, config)


def check_width(key: str, saved: dict[str, Any], config: Config) -> None:
    """Raise a UserError if the weights of the config `saved` have another width than this model's."""
    width = saved["model"]["width"]
    if width != config.model.width:
        raise UserError(f"{key}: has model.width = {width}, this run {config.model.width}; set model.width={width}")
