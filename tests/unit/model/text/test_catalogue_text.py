"""A catalogue's tokens and frozen vectors: computed once, in chunks shared by ranks, resumed after a kill, equal for any chunk size."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from recsys.config.model import TextConfig
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.text.queries import QueryTexts
from recsys.errors import UserError
from recsys.model.text import catalogue_text
from recsys.model.text.backbones import backbone_identity, load_tokenizer
from recsys.model.text.catalogue_text import Ranks, VectorsManifest, frozen_vectors, text_tokens
from recsys.model.text.encoder import encode_texts, load_frozen, locate_backbone, tokenize
from recsys.model.text.queries import QUERIES
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.distributed import run_distributed

TEXT = TextConfig(mode="frozen", backbone="tiny", max_tokens=16)
CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(Storage(str(tmp_path / "store")))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def vectors_of(dataset: Dataset, scratch: Path, ranks: Ranks = catalogue_text.SINGLE_PROCESS) -> torch.Tensor:
    folder = locate_backbone(TEXT, dataset, scratch)
    return frozen_vectors(folder, TEXT, ItemFeatures.read(dataset, scratch).texts, dataset, scratch, CPU, ranks)


def expected_vectors(dataset: Dataset, scratch: Path) -> torch.Tensor:
    folder = locate_backbone(TEXT, dataset, scratch)
    return encode_texts(load_frozen(folder, TEXT, CPU), load_tokenizer(folder), list(ItemFeatures.read(dataset).texts), 16, CPU)


def stored_chunks(dataset: Dataset) -> list[str]:
    return [found.uri for found in dataset.storage.list(f"{dataset.uri}/text_vectors") if found.uri.endswith(".arrow")]


def test_chunks_together_are_the_vectors_of_all_texts(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "CHUNK_ROWS", 16)
    vectors = vectors_of(dataset, scratch)
    torch.testing.assert_close(vectors, expected_vectors(dataset, scratch), rtol=1e-5, atol=1e-6)
    assert [uri.rpartition("/")[2] for uri in stored_chunks(dataset)] == ["00000.arrow", "00001.arrow", "00002.arrow"]
    folder = stored_chunks(dataset)[0].rpartition("/")[0]
    manifest = VectorsManifest.model_validate_json(dataset.storage.read_bytes(f"{folder}/manifest.json"))
    assert (manifest.num_rows, manifest.width, manifest.chunk_rows) == (41, vectors.shape[1], 16)


def test_another_node_takes_the_vectors_from_the_store(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "CHUNK_ROWS", 16)
    vectors = vectors_of(dataset, scratch)
    monkeypatch.setattr(catalogue_text, "load_frozen", lambda *_: pytest.fail("encoded again"))
    torch.testing.assert_close(vectors_of(dataset, scratch.with_name("another")), vectors, rtol=0, atol=0)


def test_what_a_killed_run_has_encoded_is_not_encoded_again(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "CHUNK_ROWS", 16)
    encoded = []

    def encode(encoder: Any, tokenizer: Any, texts: Any, max_tokens: int, device: torch.device) -> torch.Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(texts[0])
        return encode_texts(encoder, tokenizer, texts, max_tokens, device)

    monkeypatch.setattr(catalogue_text, "encode_texts", encode)
    with pytest.raises(KeyboardInterrupt):
        vectors_of(dataset, scratch)
    assert len(stored_chunks(dataset)) == 2
    encoded.clear()
    vectors = vectors_of(dataset, scratch)
    assert encoded == [ItemFeatures.read(dataset).texts[32]]
    torch.testing.assert_close(vectors, expected_vectors(dataset, scratch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", [b"no arrow", None])
def test_a_damaged_chunk_is_named(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None) -> None:
    monkeypatch.setattr(catalogue_text, "CHUNK_ROWS", 16)
    vectors_of(dataset, scratch)
    chunk = stored_chunks(dataset)[1]
    other_length = stored_chunks(dataset)[2]
    dataset.storage.write_bytes(chunk, damage or dataset.storage.read_bytes(other_length))
    with pytest.raises(UserError, match=r"00001\.arrow: .*delete it"):
        vectors_of(dataset, scratch.with_name("another"))


def encode_on_a_rank(dataset: Dataset, scratch: Path) -> tuple[list[int], list[list[float]]]:
    catalogue_text.CHUNK_ROWS = 6
    rank = dist.get_rank()
    own: list[int] = []
    create = Storage.create

    def noted(self: Storage, uri: str, data: bytes) -> bool:
        if uri.endswith(".arrow"):
            own.append(int(uri[-11:-6]))
            time.sleep(0.05 * rank)
        return create(self, uri, data)

    Storage.create = noted  # type: ignore[method-assign]
    vectors = vectors_of(dataset, scratch / str(rank // 2), Ranks(rank, dist.get_world_size(), dist.barrier))
    return own, vectors.tolist()


def test_ranks_share_the_chunks_and_each_has_all_vectors(dataset: Dataset, scratch: Path) -> None:
    (own_0, vectors_0), (own_1, vectors_1) = run_distributed(encode_on_a_rank, 2, dataset, scratch)
    assert (own_0, own_1) == ([0, 2, 4, 6], [1, 3, 5])
    assert vectors_0 == vectors_1
    torch.testing.assert_close(torch.tensor(vectors_0), expected_vectors(dataset, scratch), rtol=1e-5, atol=1e-6)


def test_tokens_are_made_once_and_equal_those_of_the_tokenizer(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "TOKENIZED_AT_ONCE", 7)
    folder = locate_backbone(TEXT, dataset, scratch)
    features = ItemFeatures.read(dataset, scratch)
    tokens, lengths = text_tokens(folder, TEXT, features.texts, dataset, scratch)
    whole, mask = tokenize(load_tokenizer(folder), list(features.texts), 16)
    assert tokens.shape == (41, 16)
    torch.testing.assert_close(lengths.long(), mask.sum(1))
    torch.testing.assert_close(tokens[:, : whole.shape[1]].long(), whole)
    assert whole.shape[1] < 16
    assert bool((tokens[:, whole.shape[1] :] == load_tokenizer(folder).pad_token_id).all())
    monkeypatch.setattr(catalogue_text, "load_tokenizer", lambda *_: pytest.fail("tokenized again"))
    again, _ = text_tokens(folder, TEXT, features.texts, dataset, scratch)
    torch.testing.assert_close(again, tokens)


def test_queries_are_kept_beside_the_items_texts(dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "CHUNK_ROWS", 50)
    folder, features = locate_backbone(TEXT, dataset, scratch), ItemFeatures.read(dataset, scratch)
    texts, tokenizer = list(QueryTexts(features.texts)), load_tokenizer(folder)
    of_items = vectors_of(dataset, scratch), text_tokens(folder, TEXT, features.texts, dataset, scratch)[1]
    vectors = frozen_vectors(folder, TEXT, QueryTexts(features.texts), dataset, scratch, CPU, kind=QUERIES)
    torch.testing.assert_close(vectors, encode_texts(load_frozen(folder, TEXT, CPU), tokenizer, texts, 16, CPU), rtol=1e-5, atol=1e-6)
    tokens, lengths = text_tokens(folder, TEXT, QueryTexts(features.texts), dataset, scratch, QUERIES)
    whole, mask = tokenize(tokenizer, texts, 16)
    torch.testing.assert_close(lengths.long(), mask.sum(1))
    torch.testing.assert_close(tokens[:, : whole.shape[1]].long(), whole)
    again = vectors_of(dataset, scratch), text_tokens(folder, TEXT, features.texts, dataset, scratch)[1]
    torch.testing.assert_close(again, of_items, rtol=0, atol=0)


def test_a_changed_tokenizer_makes_other_tokens_and_changed_weights_other_vectors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = [backbone_identity(str(tmp_path), with_weights) for with_weights in (False, True)]
    (tmp_path / "model.safetensors").write_bytes(b"two")
    weights_changed = [backbone_identity(str(tmp_path), with_weights) for with_weights in (False, True)]
    assert weights_changed[0] == before[0]
    assert weights_changed[1] != before[1]
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert backbone_identity(str(tmp_path), False) != before[0]
    assert backbone_identity("sentence-transformers/some", True) == "sentence-transformers/some"


def test_a_chunk_is_plain_arrow(dataset: Dataset, scratch: Path) -> None:
    vectors = vectors_of(dataset, scratch)
    table = pa.ipc.open_file(stored_chunks(dataset)[0]).read_all()
    assert table["vector"].type == pa.list_(pa.float32(), vectors.shape[1])
    assert table["vector"].to_pylist()[5] == vectors[5].tolist()
