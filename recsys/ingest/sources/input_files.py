"""Finds the input files, and reads their columns, parts and items in the child process."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pydantic import TypeAdapter

from recsys.config.data import DataConfig
from recsys.data.manifest import ColumnUse
from recsys.errors import UserError
from recsys.ingest.sources.column_mapping import Items, find_event_columns, import_items
from recsys.ingest.sources.formats import FilePart, group_parts, plan_parts
from recsys.ingest.sources.known_layouts import ATOMIC_SUFFIXES, COMMON_SUFFIXES, choose_by_name, is_table
from recsys.ingest.sources.sandbox import run_limited
from recsys.schema import FeatureKind
from recsys.store import ObjectInfo, Storage, fixed_part
from recsys.store.backends import S3_SCHEME


def find_files(storage: Storage, role: str, uri: str) -> list[ObjectInfo]:
    """List the files of an input table, sorted by name; `role` is events, items or users, `uri` a file, a folder or a pattern.

    In a folder, these are skipped: names that start with `_` or `.`, files without the suffix of a table, and empty text files, which
    some writers leave for a part without rows.

    Raises:
        UserError: no file is found, none has a known suffix, a Parquet file or every file is empty, or a link leads out of the folder.
    """
    files = [file for file in _list_visible(storage, f"data.{role}", uri) if is_table(file.uri, role)]
    if not files:
        suffixes = " ".join((ATOMIC_SUFFIXES[role], *COMMON_SUFFIXES))
        raise UserError(f"data.{role} = {uri}: no file has one of the suffixes {suffixes}")
    return _without_empty(files)


def find_in_folder(storage: Storage, role: str, folder: str) -> list[ObjectInfo]:
    """List a table's files in a folder that holds all tables; names tell them apart (see `known_layouts.choose_by_name`).

    Raises:
        UserError: there are no events. Items and users may be absent.
    """
    if not folder:
        return []
    root = fixed_part(folder)
    files = {file.uri.removeprefix(root).lstrip("/"): file for file in _list_visible(storage, "data.folder", folder)}
    chosen = choose_by_name(files, role)
    if role == "events" and not chosen:
        raise UserError(
            f"data.folder = {folder}: has no file *{ATOMIC_SUFFIXES[role]} and none like events.parquet; name the tables with data.events"
        )
    return _without_empty([file for path, file in files.items() if path in chosen]) if chosen else []


def event_columns(storage: Storage, uri: str, data: DataConfig) -> dict[str, str]:
    """Run `column_mapping.find_event_columns` in the child process."""
    found: dict[str, str] = run_limited(data.max_file_memory_bytes, find_event_columns, storage, uri, data)
    return found


def plan_tasks(storage: Storage, files: Sequence[ObjectInfo], data: DataConfig) -> list[tuple[FilePart, ...]]:
    """Split and group the files into the parts that one task reads."""
    parts = run_limited(data.max_file_memory_bytes, plan_parts, storage, list(files))
    return group_parts(TypeAdapter(list[FilePart]).validate_python(parts))


def read_items(storage: Storage, files: Sequence[ObjectInfo], data: DataConfig) -> Items:
    """Run `column_mapping.import_items` in the child process; the table comes back as an Arrow file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "items.arrow"
        kinds, uses = run_limited(data.max_file_memory_bytes, _write_items, str(path), storage, list(files), data)
        with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
            return Items(reader.read_all(), kinds, tuple(ColumnUse.model_validate(use) for use in uses))


def _write_items(
    path: str, storage: Storage, files: list[ObjectInfo], data: DataConfig
) -> tuple[dict[str, FeatureKind], tuple[ColumnUse, ...]]:
    items = import_items(storage, files, data)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, items.rows.schema) as writer:
        writer.write_table(items.rows)
    return items.kinds, items.uses


def _list_visible(storage: Storage, key: str, uri: str) -> list[ObjectInfo]:
    if ".." in uri.split("/"):
        raise UserError(f"{key} = {uri}: must not have a '..' in it; {os.path.normpath(uri)} would work")
    files = storage.expand(uri)
    root = fixed_part(uri)
    visible = [file for file in files if _is_visible(file.uri, root)]
    if not uri.startswith(S3_SCHEME):
        _check_links(key, root, visible)
    return visible


def _is_visible(uri: str, root: str) -> bool:
    names = uri.removeprefix(root).split("/")
    return not any(name.startswith(("_", ".")) for name in names if name)


def _check_links(key: str, root: str, files: list[ObjectInfo]) -> None:
    """Refuse links to folders, and links that lead out of the given folder; the folder itself may be a link."""
    real_root = os.path.realpath(root)
    for file in files:
        target = os.path.realpath(file.uri)
        if target != real_root and not target.startswith(real_root.rstrip("/") + "/"):
            raise UserError(f"{file.uri}: is a link to {target}, outside of {key} = {root}; copy the file there or name it itself")
    for folder, names, _ in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path) and _is_visible(path, root):
                raise UserError(f"{path}: is a link to a folder, which is not followed; name the folder itself")


def _without_empty(files: list[ObjectInfo]) -> list[ObjectInfo]:
    filled = [file for file in files if file.num_bytes]
    for file in files:
        if not file.num_bytes and (not filled or file.uri.lower().endswith(".parquet")):
            raise UserError(f"{file.uri}: is empty (0 bytes)")
    return filled
