"""Tokens and cached text embeddings of a dataset: tokens are computed once per node, embeddings once per dataset."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from recsys.config.model import TextConfig
from recsys.data.items import node_folder
from recsys.data.manifest import MANIFEST_NAME, Dataset
from recsys.data.node_files import create_array, map_array, shared_entry
from recsys.errors import UserError
from recsys.model.text.backbones import backbone_identity, load_tokenizer
from recsys.model.text.encoder import encode_texts, load_frozen, tokenize
from recsys.store import Storage, join

TOKENIZED_AT_ONCE = 8192
CHUNK_ROWS = 16_384
"""Rows per stored object of frozen vectors; a rank encodes one object between two barriers."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a piece of work: this rank, the world size, and a barrier."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = lambda: None


SINGLE_PROCESS = Ranks()


class VectorsManifest(BaseModel):
    """The manifest of complete frozen vectors; row 0 is padding."""

    num_rows: int
    width: int
    chunk_rows: int
    backbone: str
    pooling: str
    max_tokens: int


def text_tokens(
    folder: str, text: TextConfig, texts: Sequence[str], dataset: Dataset, scratch: Path, kind: str = ""
) -> tuple[Tensor, Tensor]:
    """Return the token ids of R texts (R, T), int32 and right-padded, and the number of real tokens of each (R,), at least 1.

    `kind` separates the files of other texts from those of item texts.
    """

    def build(new: Path) -> None:
        logger.info("text: tokenizing %d texts with the tokenizer of %s, once on this node", len(texts) - 1, text.backbone)
        tokenizer = load_tokenizer(folder)
        tokens = create_array(new / "tokens.npy", (len(texts), text.max_tokens), np.int32)
        lengths = create_array(new / "lengths.npy", (len(texts),), np.int32)
        for begin in range(0, len(texts), TOKENIZED_AT_ONCE):
            ids, mask = tokenize(tokenizer, texts[begin : begin + TOKENIZED_AT_ONCE], text.max_tokens)
            rows = slice(begin, begin + len(ids))
            tokens[rows] = tokenizer.pad_token_id
            tokens[rows, : ids.shape[1]] = ids
            lengths[rows] = mask.sum(1)

    key = _key(backbone_identity(folder, with_weights=False), text.max_tokens, kind)
    with shared_entry(node_folder(scratch, dataset.manifest, f"tokens-{key}"), build) as entry:
        return map_array(entry / "tokens.npy"), map_array(entry / "lengths.npy")


def frozen_vectors(
    folder: str,
    text: TextConfig,
    texts: Sequence[str],
    dataset: Dataset,
    scratch: Path,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    kind: str = "",
) -> Tensor:
    """Return the embeddings of R texts (R, H), computed once and stored with the dataset. All of `ranks` must call this.

    `kind` separates the files of other texts from those of item texts.

    Raises:
        UserError: stored vectors are damaged.
    """
    key = _key(backbone_identity(folder, with_weights=True), text.pooling, text.max_tokens, CHUNK_ROWS, kind)
    storage, uri = dataset.storage, join(dataset.uri, "text_vectors", key)
    _encode_missing(folder, text, texts, storage, uri, device, ranks)

    def build(new: Path) -> None:
        manifest = VectorsManifest.model_validate_json(storage.read_bytes(join(uri, MANIFEST_NAME)))
        vectors = create_array(new / "vectors.npy", (manifest.num_rows, manifest.width), np.float32)
        for number, begin in enumerate(range(0, manifest.num_rows, manifest.chunk_rows)):
            rows = vectors[begin : begin + manifest.chunk_rows]
            chunk = _read_chunk(storage, _chunk_uri(uri, number))
            if chunk.shape != rows.shape:
                shapes = f"{chunk.shape} in place of {rows.shape}"
                raise UserError(f"{_chunk_uri(uri, number)}: has vectors of shape {shapes}; delete it to rebuild it")
            rows[:] = chunk

    with shared_entry(node_folder(scratch, dataset.manifest, f"vectors-{key}"), build) as entry:
        return map_array(entry / "vectors.npy")


def _encode_missing(
    folder: str, text: TextConfig, texts: Sequence[str], storage: Storage, uri: str, device: torch.device, ranks: Ranks
) -> None:
    """Encode the chunks that are missing in the store, then write the manifest.

    Rank r of N encodes chunks r, r + N, ... A barrier after each round limits the wait to the time of one chunk, because barriers time
    out after half an hour. Every rank runs the same number of rounds, no matter which chunks exist.
    """
    num_rows = len(texts)
    num_chunks = -(-num_rows // CHUNK_ROWS)
    present = {found.uri for found in storage.list(uri)}
    model = None
    for first in range(0, num_chunks, ranks.world_size):
        number = first + ranks.rank
        if number < num_chunks and _chunk_uri(uri, number) not in present:
            model = model or (load_frozen(folder, text, device), load_tokenizer(folder))
            begin = number * CHUNK_ROWS
            chunk = texts[begin : begin + CHUNK_ROWS]
            logger.info("text: encoding texts %d to %d of %d with %s", begin, begin + len(chunk) - 1, num_rows - 1, text.backbone)
            storage.create(_chunk_uri(uri, number), _chunk_bytes(encode_texts(*model, chunk, text.max_tokens, device).numpy()))
        ranks.barrier()
    if ranks.rank == 0 and join(uri, MANIFEST_NAME) not in present:
        manifest = VectorsManifest(
            num_rows=num_rows,
            width=_read_chunk(storage, _chunk_uri(uri, 0)).shape[1],
            chunk_rows=CHUNK_ROWS,
            backbone=text.backbone,
            pooling=text.pooling,
            max_tokens=text.max_tokens,
        )
        storage.create(join(uri, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
    ranks.barrier()


def _chunk_uri(uri: str, number: int) -> str:
    return join(uri, f"{number:05d}.arrow")


def _chunk_bytes(vectors: NDArray[np.float32]) -> bytes:
    table = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _read_chunk(storage: Storage, uri: str) -> NDArray[np.float32]:
    try:
        column = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(uri))).read_all()["vector"].combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri}: is damaged ({error}); delete it to rebuild it") from error
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size))


def _key(*identity: str | int) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
