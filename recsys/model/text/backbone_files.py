"""Safety checks of a model folder, from file names, sizes and headers, before anything in it is loaded.

A model folder is untrusted input: weights must be safetensors, nothing in it may be code, and no file may lead out of it.
"""

import json
import struct
from pathlib import Path
from typing import Any

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Config and tokenizer."""

WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 100_000
MOST_JSON_BYTES = 256 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
_CODE_KEYS = ("auto_map", "custom_pipelines", "quantization_config")
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm")


def find_fault(folder: Path, names: set[str] | None = None) -> str | None:
    """Return why the model in a folder must not be loaded, or None.

    Args:
        names: of all of the model's files, where its weights are elsewhere and only config and tokenizer are in the folder.
    """
    folder = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.resolve().is_relative_to(folder) and not _is_hub_blob(path, folder):
            return f"{path.name} is a link that leads out of the folder"
    found = {path.name for path in folder.iterdir()}
    if "config.json" not in found:
        return "there is no config.json"
    if "adapter_config.json" in found:
        return "it holds an adapter of another model (adapter_config.json); merge the adapter into its model first"
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        if name in found and (fault := _json_fault(folder / name)):
            return f"{name} {fault}"
    if fault := _names_fault(found if names is None else names):
        return fault
    return _weights_fault(folder, found) if names is None else None


def _is_hub_blob(path: Path, folder: Path) -> bool:
    """Return whether a file is a symlink of the hub's cache to its own blobs."""
    return folder.parent.name == "snapshots" and path.resolve().is_relative_to(folder.parents[1].resolve() / "blobs")


def _json_fault(path: Path) -> str | None:
    if path.stat().st_size > MOST_JSON_BYTES:
        return f"has more than {MOST_JSON_BYTES >> 20} MiB"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    if not isinstance(content, dict):
        return "is no JSON object"
    return _code_fault(content) if path.name != "tokenizer.json" else None  # which has a vocabulary, and no settings


def _code_fault(content: dict[str, Any]) -> str | None:
    """Return which setting, at any depth, asks for code from elsewhere."""
    for key, value in content.items():
        if key in _CODE_KEYS and value:
            return f"has '{key}', which asks for code or packages from elsewhere; it is never run here"
        if (key.endswith("_implementation") or "_implementation_" in key) and value not in _IMPLEMENTATIONS:
            return f"has {key} = {str(value)[:80]!r}, which asks for code from elsewhere; it is never run here"
        if isinstance(value, dict) and (fault := _code_fault(value)):
            return fault
    return None


def _names_fault(names: set[str]) -> str | None:
    """Return what is wrong with the names of a model's files: its weights must be safetensors, whole or with an index."""
    if names & {WEIGHTS, _INDEX}:
        return None
    others = sorted(name for name in names if name.endswith((*_PICKLES, ".bin.index.json", ".safetensors")))
    advice = "; save it with model.save_pretrained, which writes safetensors" if others else ""
    return f"there are no weights in safetensors, {WEIGHTS} or {_INDEX} ({', '.join(others) or 'no weights at all'}){advice}"


def _weights_fault(folder: Path, names: set[str]) -> str | None:
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if _INDEX in names and (fault := _index_fault(folder / _INDEX, set(weights))):
        return fault
    for name in weights:
        if fault := _header_fault(folder / name):
            return f"{name} {fault}"
    return None


def _index_fault(path: Path, weights: set[str]) -> str | None:
    if fault := _json_fault(path):
        return f"{path.name} {fault}"
    parts = json.loads(path.read_bytes()).get("weight_map")
    others = sorted(set(map(str, parts.values())) - weights) if isinstance(parts, dict) else ["no weight_map"]
    return f"{path.name} names {others[0][:80]!r}, which is no safetensors file of the folder" if others else None


def _header_fault(path: Path) -> str | None:
    """Check the header of a safetensors file: its size, its tensors, and that these lie in the file."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 <= length <= min(MOST_HEADER_BYTES, num_bytes - 8):
            return f"has a header of {length} bytes in a file of {num_bytes}; at most {MOST_HEADER_BYTES} are read"
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            return f"has a header that is not valid JSON ({str(error)[:80]})"
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        return f"has a header that lists {len(header)} tensors; at most {MOST_TENSORS} are read"
    return _offsets_fault([entry for name, entry in header.items() if name != "__metadata__"], num_bytes - 8 - length)


def _offsets_fault(tensors: list[Any], num_bytes: int) -> str | None:
    for entry in tensors:
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(place, int) for place in offsets)):
            return "has a tensor without offsets"
        if not 0 <= offsets[0] <= offsets[1] <= num_bytes:
            return "has a tensor that lies outside of the file, as where a download was cut"
    return None
