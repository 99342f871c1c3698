"""The text encoder: a language model with pooling, batching by text length, and the `tiny` backbone."""

import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from recsys.config.model import TextConfig
from recsys.data.items import ItemFeatures, node_folder
from recsys.data.manifest import Dataset
from recsys.data.node_files import locked
from recsys.model.text.backbones import MINILM, TINY, fetch_folder, load_backbone, minilm_folder
from recsys.store import join, private_folder
from recsys.store.backends import S3_SCHEME

ENCODE_CHUNK = 64
LENGTH_GROUPS = 4
"""Maximum forward passes of the language model per batch of texts; each encodes the texts of one length group."""

TINY_VOCABULARY = 4096
TINY_TEXTS = 200_000
"""Maximum number of texts, spread evenly over the catalogue, that train the tiny tokenizer."""

TINY_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


class TextEncoder(nn.Module):
    """A Hugging Face encoder or decoder with pooling to one vector per text. Shapes: D texts, T tokens, H its width."""

    def __init__(self, backbone: Any, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.width: int = backbone.config.hidden_size

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode right-padded token ids (D, T) where `mask` (D, T) is 1; return (D, H). Callers trim padding common to all texts."""
        hidden = self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state  # (D, T, H)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def locate_backbone(text: TextConfig, dataset: Dataset, scratch: Path) -> str:
    """Return a local folder with the backbone, or its Hub name.

    Raises:
        UserError: the backbone is not installed or not in the store.
    """
    if text.backbone == MINILM:
        return str(minilm_folder())
    if text.backbone == TINY:
        return str(fetch_folder(dataset.storage, _tiny_backbone(text, dataset, scratch), scratch))
    if text.backbone.startswith(S3_SCHEME):
        return str(fetch_folder(dataset.storage, text.backbone, scratch))
    return text.backbone


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both (D, T) int64, right-padded to the longest text; an empty text has at least one token."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    mask = encoded["attention_mask"].clone()
    mask[:, 0] = 1  # a decoder's tokenizer returns no token for an empty text, and an empty mean is NaN
    return encoded["input_ids"], mask


def token_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the mask of right-padded tokens, (D, T) int64: 1 for real tokens, 0 for padding."""
    return (torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)).long()


def load_frozen(folder: str, text: TextConfig, device: torch.device) -> TextEncoder:
    """Load a backbone in evaluation mode, without adapters."""
    return TextEncoder(load_backbone(folder, text.model_copy(update={"mode": "frozen"})), text.pooling).to(device).eval()


@torch.no_grad()
def encode_texts(encoder: TextEncoder, tokenizer: Any, texts: Sequence[str], max_tokens: int, device: torch.device) -> Tensor:
    """Encode texts with a frozen encoder, similar lengths together; return (D, H) float32 on the CPU."""
    tokens, mask = tokenize(tokenizer, texts, max_tokens)
    lengths = mask.sum(1)
    vectors = torch.zeros(len(texts), encoder.width)
    for chunk in torch.argsort(lengths, stable=True).split(ENCODE_CHUNK):
        width = int(lengths[chunk].max())
        vectors[chunk] = encoder(tokens[chunk, :width].to(device), mask[chunk, :width].to(device)).float().cpu()
    return vectors


def group_widths(lengths: Tensor, max_groups: int = LENGTH_GROUPS) -> Tensor:
    """Return the widths of at most `max_groups` length groups, ascending, with the least total padding (dynamic programming).

    A text, whose length is one of `lengths`, belongs to the narrowest group that fits it.
    """
    widths, counts = np.unique(lengths.numpy(), return_counts=True)
    up_to = np.concatenate([[0], np.cumsum(counts)])  # number of texts up to each width
    cost = np.where(up_to == 0, 0.0, np.inf)
    firsts = []
    for _ in range(max_groups):
        costs = [cost[:last] + (up_to[last] - up_to[:last]) * widths[last - 1] for last in range(1, len(cost))]
        firsts.append([0, *(int(np.argmin(choices)) for choices in costs)])
        cost = np.array([0.0, *(choices.min() for choices in costs)])
    chosen, last = [], len(widths)
    for first in reversed(firsts):
        if last:
            chosen.append(int(widths[last - 1]))
        last = first[last]
    return torch.tensor(chosen[::-1])


def encode_groups(encoder: TextEncoder, tokens: Tensor, counts: Tensor, widths: Tensor, on_host: Tensor) -> Tensor:
    """Encode the rows `on_host` (D,) of `tokens` (R, T) with the language model, similar lengths together; return (D, H).

    The numbers of real tokens `counts` (R,), the group `widths` and the rows must be on the CPU; `tokens` may be on any device. Every rank
    runs one forward per group, since a ZeRO-3 forward is collective; a group without rows encodes row 0.
    """
    device = next(encoder.parameters()).device
    group = torch.bucketize(counts[on_host], widths)
    vectors = []
    for number, width in enumerate(widths.tolist()):
        members = on_host[group == number]
        chosen = members if len(members) else torch.zeros(1, dtype=torch.long)
        real = counts[chosen].to(device, non_blocking=True)
        own = tokens[chosen.to(tokens.device, non_blocking=True), :width].to(device, non_blocking=True).long()
        vectors.append(encoder(own, token_mask(real, width))[: len(members)])
    back = group.argsort(stable=True).argsort()
    return F.embedding(back.to(device, non_blocking=True), torch.cat(vectors))


def _tiny_backbone(text: TextConfig, dataset: Dataset, scratch: Path) -> str:
    """Create a small Transformer in the store, once, with a tokenizer trained on the catalogue; return its URI."""
    uri = join(dataset.uri, "backbones", f"tiny-{text.max_tokens}")
    with locked(node_folder(scratch, dataset.manifest, f"tiny-{text.max_tokens}")):
        if not dataset.storage.exists(join(uri, "model.safetensors")):
            _make_tiny_backbone(uri, text, dataset, scratch)
    return uri


def _make_tiny_backbone(uri: str, text: TextConfig, dataset: Dataset, scratch: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = private_folder(scratch / "backbones" / f"new-{uuid.uuid4().hex[:8]}")
    texts = ItemFeatures.read(dataset, scratch).texts
    stride = -(-len(texts) // TINY_TEXTS)
    tokenizer = _train_tokenizer(texts if stride == 1 else (texts[row] for row in range(0, len(texts), stride)))
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=text.max_tokens, **TINY_SHAPE), add_pooling_layer=False
        )
    model.config.save_pretrained(folder)  # the model's save_pretrained writes only on rank 0
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):  # weights last: they mark it complete
        dataset.storage.create(join(uri, path.name), path.read_bytes())
    shutil.rmtree(folder)


def _train_tokenizer(texts: Iterable[str]) -> Any:
    """Train a byte-pair encoding tokenizer; unlike the other trainers, it gives the same vocabulary each time."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=TINY_VOCABULARY, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
