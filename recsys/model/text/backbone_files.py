"""Safety checks of a model folder by file names, sizes and headers, before anything in it is loaded.

A model folder is untrusted input: weights must be safetensors, no file may ask for code, and no link may leave the folder.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of config and tokenizer files."""

WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 100_000
MOST_JSON_BYTES = 256 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5")
_CODE_KEYS = ("auto_map", "custom_pipelines", "quantization_config")
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm")


class BackboneError(Exception):
    """A language model cannot be used; the message gives the reason without the model's name."""


def check_files(folder: Path, names: set[str] | None = None) -> None:
    """Check the files of a model folder.

    Args:
        names: all file names of the model, if its weights are elsewhere and the folder holds only config and tokenizer.

    Raises:
        BackboneError: the model is incomplete or not safe to load.
    """
    folder = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.resolve().is_relative_to(folder) and not _is_hub_blob(path, folder):
            raise BackboneError(f"{path.name} is a link that leads out of the folder")
    found = {path.name for path in folder.iterdir()}
    if "config.json" not in found:
        raise BackboneError("there is no config.json")
    if "adapter_config.json" in found:
        raise BackboneError("it holds an adapter of another model (adapter_config.json); merge the adapter into its model first")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        if name in found:
            _read_json(folder / name)
    _check_names(found if names is None else names)
    if names is None:
        _check_weights(folder, {name for name in found if name.endswith(".safetensors")}, has_index=_INDEX in found)


def _is_hub_blob(path: Path, folder: Path) -> bool:
    """Return whether a file is a symlink in the Hugging Face cache to its own blobs."""
    return folder.parent.name == "snapshots" and path.resolve().is_relative_to(folder.parents[1].resolve() / "blobs")


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise BackboneError(f"{path.name} has more than {MOST_JSON_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{path.name} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BackboneError(f"{path.name} is not a JSON object")
    if path.name != "tokenizer.json":  # it holds a vocabulary, no settings
        _refuse_code(path.name, content)
    return content


def _refuse_code(name: str, content: dict[str, Any]) -> None:
    """Raise a BackboneError if a setting, at any depth, asks for external code."""
    for key, value in content.items():
        if key in _CODE_KEYS and value:
            raise BackboneError(f"{name} has '{key}', which requests external code or packages; they are never run")
        if (key.endswith("_implementation") or "_implementation_" in key) and value not in _IMPLEMENTATIONS:
            raise BackboneError(f"{name} has {key} = {str(value)[:80]!r}, which requests external code; such code is never run")
        if isinstance(value, dict):
            _refuse_code(name, value)


def _check_names(names: set[str]) -> None:
    """Check that the weights are safetensors, in one file or with an index."""
    if names.isdisjoint((WEIGHTS, _INDEX)):
        others = sorted(name for name in names if name.endswith((*_PICKLES, ".bin.index.json", ".safetensors")))
        advice = "; save it with model.save_pretrained, which writes safetensors" if others else ""
        found = ", ".join(others) or "no weights at all"
        raise BackboneError(f"there are no weights in safetensors, {WEIGHTS} or {_INDEX} ({found}){advice}")


def _check_weights(folder: Path, weights: set[str], has_index: bool) -> None:
    if has_index:
        parts = _read_json(folder / _INDEX).get("weight_map")
        others = sorted(set(map(str, parts.values())) - weights) if isinstance(parts, dict) else ["no weight_map"]
        if others:
            raise BackboneError(f"{_INDEX} names {others[0][:80]!r}, which is not a safetensors file in the folder")
    for name in sorted(weights):
        if fault := _header_fault(folder / name):
            raise BackboneError(f"{name} has {fault}")


def _header_fault(path: Path) -> str | None:
    """Return the fault in the header of a safetensors file, or None."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little") if len(head) == 8 else -1
    if not 0 <= length <= min(MOST_HEADER_BYTES, num_bytes - 8):
        return f"a header of {length} bytes in a file of {num_bytes}; at most {MOST_HEADER_BYTES} are read"
    try:
        with safe_open(path, "np") as weights:
            num_tensors = len(weights.keys())
    except SafetensorError as error:
        return f"a damaged header, or a tensor beyond the end of the file, as after an incomplete download ({str(error)[:80]})"
    return f"a header that lists {num_tensors} tensors; at most {MOST_TENSORS} are read" if num_tensors > MOST_TENSORS else None
