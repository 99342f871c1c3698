"""Language models that cannot or must not be used are refused in one line before any worker starts; none of their code is run."""

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from recsys.config.model import TextConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.launch.checks import check_pretraining
from recsys.model.text.backbones import check_backbone, load_backbone, load_tokenizer
from recsys.model.text.encoder import _train_tokenizer
from recsys.store import Storage
from tests.backbones import TEXTS, save_backbone
from tests.conftest import S3Server
from tests.datasets import make_dataset, small_config, small_settings
from tests.verbs import refusal_of

LIMIT_SECONDS = 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_backbone(tmp_path / "backbone", "bert"))


def refusal(folder: Path | str, tmp_path: Path, **values: Any) -> str:
    text = TextConfig(**{"backbone": str(folder), "mode": "full", "max_tokens": 16, **values})
    with pytest.raises(UserError) as error:
        check_backbone(text, Storage(str(tmp_path / "store")), tmp_path / "scratch")
    line = str(error.value)
    assert line.startswith(f"model.text.backbone = {folder}: ")
    assert "\n" not in line
    return line


class Canary:
    """Unpickled, it writes the file that must be absent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def only_pickle(folder: Path, canary: Path, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))


def remote_code(folder: Path, canary: Path, name: str, key: str) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    edit(folder, name, auto_map={key: "evil.Evil"}, model_type="evil")


def header(folder: Path, length: int, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content)


def many_tensors(folder: Path) -> None:
    tensors = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100_001)}
    content = json.dumps(tensors).encode()
    header(folder, len(content), content)


def outside(folder: Path) -> None:
    content = json.dumps({"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    header(folder, len(content), content + b"cut")


def adapter_of_another(folder: Path) -> None:
    edit(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder.parent / "elsewhere"))


def shards_elsewhere(folder: Path, name: str) -> None:
    edit(folder, "model.safetensors.index.json", metadata={}, weight_map={"embeddings.word_embeddings.weight": name})


def linked(folder: Path) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to(secret)


HOSTILE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "pickle": (only_pickle, "there are no weights in safetensors, model.safetensors or"),
    "pickle by another name": (
        lambda folder, canary: only_pickle(folder, canary, "model.ckpt"),
        "(model.ckpt)",
    ),
    "index of pickles": (
        lambda folder, canary: shards_elsewhere(folder, "pytorch_model-00001.bin"),
        "which is not a safetensors file in the folder",
    ),
    "index that leads out": (
        lambda folder, canary: shards_elsewhere(folder, "../evil.safetensors"),
        "which is not a safetensors file in the folder",
    ),
    "code for the model": (lambda folder, canary: remote_code(folder, canary, "config.json", "AutoModel"), "config.json has 'auto_map'"),
    "code for the tokenizer": (
        lambda folder, canary: remote_code(folder, canary, "tokenizer_config.json", "AutoTokenizer"),
        "tokenizer_config.json has 'auto_map'",
    ),
    "kernel of the hub": (lambda folder, canary: edit(folder, "config.json", _attn_implementation="evil/kernel"), "_attn_implementation"),
    "adapter of another model": (lambda folder, canary: adapter_of_another(folder), "adapter of another model"),
    "header above the caps": (lambda folder, canary: header(folder, 1 << 40, b"{}"), "has a header of 1099511627776 bytes"),
    "header of too many tensors": (lambda folder, canary: many_tensors(folder), "lists 100001 tensors"),
    "tensor outside of the file": (lambda folder, canary: outside(folder), "beyond the end of the file"),
    "link that leads out": (lambda folder, canary: linked(folder), "a link that leads out"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_before_anything_is_loaded(folder: Path, tmp_path: Path, name: str) -> None:
    harm, reason = HOSTILE[name]
    canary = tmp_path / "canary"
    harm(folder, canary)
    assert reason in refusal(folder, tmp_path)
    with pytest.raises(UserError):
        load_backbone(str(folder), TextConfig(backbone=str(folder)))
    assert not canary.exists()


def test_there_are_twelve() -> None:
    assert len(HOSTILE) == 12


def test_a_canary_sings_where_nobody_refuses(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000])
def test_configs_that_are_none(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json is " in refusal(folder, tmp_path)


def test_a_type_that_is_unknown_and_one_without_a_width(folder: Path, tmp_path: Path) -> None:
    edit(folder, "config.json", model_type="no-such-type")
    assert "its config.json cannot be read" in refusal(folder, tmp_path)
    transformers.CLIPConfig().save_pretrained(folder)
    assert "no single width" in refusal(folder, tmp_path)


def test_folders_and_names_that_are_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "../nowhere", "models/one/two", "~/model"):
        assert "no such folder" in refusal(name, tmp_path)
    begin = time.monotonic()
    error = refusal("nobody/no-such-model", tmp_path)
    assert "no such folder, and " in error
    assert "Hugging Face hub" in error
    assert time.monotonic() - begin < LIMIT_SECONDS
    (tmp_path / "empty").mkdir()
    assert "there is no config.json" in refusal(tmp_path / "empty", tmp_path)


def test_no_tokenizer_and_one_of_another_model(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    assert "has no tokenizer" in refusal(folder, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be loaded" in refusal(folder, tmp_path)
    tokenizer = _train_tokenizer(TEXTS)
    tokenizer.add_tokens(["[MORE]", "[TOKENS]"])
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    assert f"its tokenizer has ids up to {size - 1}, and the model {size - 2} rows of embeddings" in refusal(folder, tmp_path)


def test_texts_longer_than_the_positions(tmp_path: Path) -> None:
    bert, roberta = (Path(save_backbone(tmp_path / family, family)) for family in ("bert", "roberta"))
    assert "has 64 positions, fewer than model.text.max_tokens = 65; 64 would work" in refusal(bert, tmp_path, max_tokens=65)
    assert "has 63 positions" in refusal(roberta, tmp_path, max_tokens=64)  # the padding's own is none of them
    for folder, most in ((bert, 64), (roberta, 63)):
        text = TextConfig(backbone=str(folder), mode="frozen", max_tokens=most)
        check_backbone(text, Storage(str(tmp_path)), tmp_path)
        tokens = torch.full((1, most), 5)
        load_backbone(str(folder), text)(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    t5 = save_backbone(tmp_path / "t5", "t5")
    check_backbone(TextConfig(backbone=t5, max_tokens=2000), Storage(str(tmp_path)), tmp_path)


def test_what_the_tokenizer_adds_is_counted(folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(folder))
    many = " ".join(["[CLS]"] * 5)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{many} $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save_pretrained(folder)
    assert "adds so many tokens of its own" in refusal(folder, tmp_path, max_tokens=4)


def test_encoder_decoders_are_refused_by_name_but_for_those_with_an_encoder_of_their_own(folder: Path, tmp_path: Path) -> None:
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokenizer = load_tokenizer(str(folder))
    transformers.BartModel(transformers.BartConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    assert "is an encoder-decoder (bart)" in refusal(tmp_path / "bart", tmp_path)
    t5 = save_backbone(tmp_path / "t5", "t5")
    assert type(load_backbone(t5, TextConfig(backbone=t5))).__name__ == "T5EncoderModel"


def test_lora_targets_that_the_model_has_not(folder: Path, tmp_path: Path) -> None:
    line = refusal(folder, tmp_path, mode="lora", lora_targets=("query", "q_proj"))
    assert "has no linear layer named 'q_proj' (model.text.lora_targets); it has dense, key, query, value" in line
    text = TextConfig(backbone=str(folder), mode="lora", lora_targets=("query", "value"))
    check_backbone(text, Storage(str(tmp_path)), tmp_path)
    learned = {
        name.rpartition(".lora_")[0].rpartition(".")[2]
        for name, each in load_backbone(str(folder), text).named_parameters()
        if each.requires_grad
    }
    assert learned == {"query", "value"}
    gpt2 = save_backbone(tmp_path / "gpt2", "gpt2")
    check_backbone(TextConfig(backbone=gpt2, mode="lora", lora_targets=("c_attn",)), Storage(str(tmp_path)), tmp_path)


def test_without_a_padding_token_any_other_serves_since_padding_is_masked(folder: Path, tmp_path: Path) -> None:
    from recsys.model.text.encoder import TextEncoder, encode_texts

    def vectors() -> torch.Tensor:
        text = TextConfig(backbone=str(folder), mode="frozen", max_tokens=16)
        check_backbone(text, Storage(str(tmp_path)), tmp_path)
        encoder = TextEncoder(load_backbone(str(folder), text), "mean").eval()
        return encode_texts(encoder, load_tokenizer(str(folder)), [*TEXTS[:8], "short"], 16, torch.device("cpu"))

    before = vectors()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("pad_token", "eos_token"):
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    torch.testing.assert_close(vectors(), before)


def test_weights_that_are_not_the_configs(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(folder), TextConfig(backbone=str(folder)))


def test_a_folder_in_the_store_is_checked_by_its_small_files(moto_server: S3Server, folder: Path, tmp_path: Path) -> None:
    moto_storage = moto_server.fresh_storage()
    uri = moto_storage.uri("backbones", "bert")
    for path in folder.iterdir():
        moto_storage.upload(path, f"{uri}/{path.name}")
    scratch = tmp_path / "scratch"
    check_backbone(TextConfig(backbone=uri, max_tokens=16), moto_storage, scratch)
    assert not list(scratch.rglob("*.safetensors"))
    with pytest.raises(UserError, match="has 64 positions"):
        check_backbone(TextConfig(backbone=uri, max_tokens=65), moto_storage, scratch)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("data") / "store")))


def test_a_model_that_predicts_no_tokens_is_no_start_for_hidden_ones(dataset: Dataset, tmp_path: Path) -> None:
    t5 = save_backbone(tmp_path / "t5", "t5")
    config = small_config(dataset, tmp_path, model__text__backbone=t5, model__text__max_tokens=16)
    with pytest.raises(UserError, match=r"of type t5 predicts no tokens; pretraining\.objectives=\['contrastive'\] would work"):
        check_pretraining(config)
    check_pretraining(config.with_values({"pretraining.objectives": ["contrastive"]}))


@pytest.mark.parametrize("verb", ["jobs.train", "tune.search", "jobs.pretrain"])
@pytest.mark.parametrize("fault", ["nowhere", "positions", "pickle"])
def test_a_verb_refuses_within_seconds_in_one_line(folder: Path, dataset: Dataset, tmp_path: Path, verb: str, fault: str) -> None:
    values: dict[str, object] = {"model.text.backbone": str(folder), "model.text.mode": "frozen", "model.text.max_tokens": 16}
    if fault == "nowhere":
        values["model.text.backbone"] = str(tmp_path / "nowhere")
    elif fault == "positions":
        values["model.text.max_tokens"] = 100
    else:
        only_pickle(folder, tmp_path / "canary")
    settings = {
        key: value for key, value in small_settings(dataset, tmp_path).items() if key not in ("data.max_history", "model.width")
    } | values
    arguments = [f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    line, seconds = refusal_of(verb, *arguments)
    assert line.startswith("error: model.text.backbone = ")
    assert seconds < LIMIT_SECONDS
    assert not (tmp_path / "canary").exists()
