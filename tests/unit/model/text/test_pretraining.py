"""Pretraining losses compared with plain references, and token prediction heads compared with Hugging Face's models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from recsys.config import Config, load_config
from recsys.data.text.corpus import NO_TARGET, MaskedTokens, Pairs, TextBatch
from recsys.errors import UserError
from recsys.model.text.encoder import _train_tokenizer
from recsys.model.text.pretraining import BACKBONE_PREFIX, build_pretrainer

TEXTS = ["a comedy about a dog", "a drama about two dogs and a cat", "a western", "nothing like the others at all"]
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a backbone of each kind and its tokenizer."""
    path = tmp_path_factory.mktemp("backbones")
    tokenizer = _train_tokenizer(TEXTS)
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SHAPE)
    llama = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE)
    models = {
        "encoder": BertModel(bert),
        "encoder-with-head": BertForMaskedLM(bert),
        "decoder": LlamaForCausalLM(llama).model,
        "decoder-with-head": LlamaForCausalLM(llama),
        "t5": T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    }
    for name, model in models.items():
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


def make_config(folder: Path, *objectives: str) -> Config:
    return load_config().with_values({"model.text.backbone": str(folder), "pretraining.objectives": list(objectives)})


def some_tokens(folder: Path) -> MaskedTokens:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 30, (3, 7), generator=generator)
    lengths = torch.tensor([7, 4, 5])
    is_target = (torch.arange(7) < lengths[:, None]) & (torch.rand(3, 7, generator=generator) < 0.6)
    return MaskedTokens(tokens, lengths, torch.where(is_target, tokens.flip(0), NO_TARGET))


@pytest.mark.parametrize("kind", ["encoder-with-head", "decoder-with-head"])
def test_a_head_that_the_backbone_brings_is_used(folder: Path, kind: str) -> None:
    model, _ = build_pretrainer(make_config(folder / kind, "masked"), str(folder / kind))
    masked = some_tokens(folder)
    sums = model.eval()(TextBatch(torch.arange(3), masked, None))
    whole = (BertForMaskedLM if "encoder" in kind else LlamaForCausalLM).from_pretrained(folder / kind).eval()
    mask = (torch.arange(7) < masked.lengths[:, None]).long()
    logits = whole(input_ids=masked.tokens, attention_mask=mask).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), masked.targets, reduction="sum")
    torch.testing.assert_close(sums["masked"], expected)


@pytest.mark.parametrize(
    ("kind", "is_tied"), [("encoder", True), ("encoder-with-head", True), ("decoder", True), ("decoder-with-head", False)]
)
def test_the_head_shares_the_input_embeddings_unless_its_model_says_otherwise(folder: Path, kind: str, is_tied: bool) -> None:
    model, _ = build_pretrainer(make_config(folder / kind, "masked"), str(folder / kind))
    embeddings = model.text_encoder["pooled"].backbone.get_input_embeddings().weight
    assert any(parameter is embeddings for parameter in model.text_encoder["head"].parameters()) == is_tied
    assert all(name.startswith("text_encoder.") for name, _ in model.named_parameters()), "all learn at the backbone's rate"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_hidden_follows_from_the_backbones_kind(folder: Path) -> None:
    _, masked = build_pretrainer(make_config(folder / "encoder", "masked"), str(folder / "encoder"))
    assert masked is not None
    assert masked.mask_token == 1, "this tokenizer has no mask token, so the unknown one stands in"
    assert set(masked.special) == {0, 1, 2, 3}
    _, following = build_pretrainer(make_config(folder / "decoder", "masked"), str(folder / "decoder"))
    assert following is not None
    assert following.mask_token is None


def test_a_model_that_predicts_no_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"of type t5 predicts no tokens; pretraining.objectives=\['contrastive'\] would work"):
        build_pretrainer(make_config(folder / "t5", "masked"), str(folder / "t5"))
    assert build_pretrainer(make_config(folder / "t5", "contrastive"), str(folder / "t5"))[1] is None


def test_the_contrastive_loss_is_that_of_a_plain_loop(folder: Path) -> None:
    config = make_config(folder / "encoder", "contrastive").with_values({"pretraining.temperature": 0.3})
    model, _ = build_pretrainer(config, str(folder / "encoder"))
    items, partners = torch.tensor([5, 6, 7, 8]), torch.tensor([6, 7, 0, 5])
    known = torch.tensor([[6, 9], [7, 5], [0, 0], [5, 0]])
    tokens = torch.randint(4, 30, (8, 6), generator=torch.Generator().manual_seed(2))
    pairs = Pairs(items, partners, known, tokens, torch.tensor([6, 3, 4, 5, 3, 4, 2, 6]))
    found = model.eval()(TextBatch(items, None, pairs))["contrastive"]
    own, others = model.encode(pairs)
    expected = torch.zeros(())
    for row in range(4):
        if partners[row] == 0:
            continue
        scores = [own[row] @ others[row] / 0.3]
        for column in range(4):
            is_negative = partners[column] not in (0, items[row], *known[row].tolist())
            scores += [own[row] @ others[column] / 0.3] if is_negative else []
        expected = expected - torch.stack(scores).log_softmax(0)[0]
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


def test_the_backbones_weights_are_found_by_their_prefix(folder: Path) -> None:
    model, _ = build_pretrainer(make_config(folder / "encoder", "masked"), str(folder / "encoder"))
    names = {name.removeprefix(BACKBONE_PREFIX) for name in model.state_dict() if name.startswith(BACKBONE_PREFIX)}
    assert names == set(model.text_encoder["pooled"].backbone.state_dict())
