"""Safety checks of a model folder, from file names, sizes and headers, before anything in it is loaded.

A model folder is untrusted input: weights must be safetensors, nothing in it may be code, and no file may lead out of it.
"""

import json
import struct
from pathlib import Path
from typing import Any

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Config and tokenizer."""

MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 100_000
MOST_JSON_BYTES = 256 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
_CODE_KEYS = ("auto_map", "custom_pipelines", "quantization_config")
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def find_fault(folder: Path, has_weights: bool = True) -> str | None:
    """Return why the model in a folder must not be loaded, or None. Without `has_weights` its weights are elsewhere."""
    paths = sorted(folder.iterdir())
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()) and not _is_hub_blob(path, folder):
            return f"{path.name} is a link that leads out of the folder"
    names = {path.name for path in paths}
    if "config.json" not in names:
        return "there is no config.json"
    if "adapter_config.json" in names:
        return "it holds an adapter of another model (adapter_config.json); merge the adapter into its model first"
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        if name in names and (fault := _json_fault(folder / name)):
            return f"{name} {fault}"
    return _weights_fault(folder, names) if has_weights else None


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
    for key in _CODE_KEYS:
        if content.get(key):
            return f"has '{key}', which asks for code or packages from elsewhere; it is never run here"
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if content.get(key) not in _ATTENTIONS:
            return f"has {key} = {str(content[key])[:80]!r}, which asks for code from elsewhere; it is never run here"
    return None


def _weights_fault(folder: Path, names: set[str]) -> str | None:
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    index = "model.safetensors.index.json"
    if not weights:
        pickles = sorted(name for name in names if name.endswith(_PICKLES) or name.endswith(".bin.index.json"))
        advice = "; save it with model.save_pretrained, which writes safetensors" if pickles else ""
        return f"there are no weights in safetensors ({', '.join(pickles) or 'no weights at all'}){advice}"
    if index in names and (fault := _index_fault(folder / index, set(weights))):
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
