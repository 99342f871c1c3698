"""Masking rules and sampled pairs of texts; a draw depends only on seed, epoch and item."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.text.cooccurrence import Cooccurrences
from recsys.data.text.corpus import NO_TARGET, VALIDATION, TextCollator, TextSplit, TokenMasking
from recsys.errors import UserError
from recsys.store import Storage
from tests.datasets import make_dataset

VOCABULARY, MASK, SPECIAL = 1000, 3, (0, 1, 2)
WIDTH = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("texts") / "store")), num_users=200, num_items=120)


def make_collator(dataset: Dataset, folder: Path, seed: int = 0, masking: TokenMasking | None = None) -> TextCollator:
    catalogue = ItemFeatures.read(dataset)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, WIDTH + 1, (dataset.manifest.num_items + 1,), generator=generator, dtype=torch.int32)
    tokens = torch.randint(10, VOCABULARY, (len(lengths), WIDTH), generator=generator, dtype=torch.int32)
    tokens[:, 0] = SPECIAL[2]
    return TextCollator(
        tokens=tokens,
        lengths=lengths,
        split=TextSplit.read(dataset, catalogue, folder),
        masking=masking or TokenMasking(0.3, MASK, SPECIAL, VOCABULARY),
        partners=Cooccurrences.read(dataset, catalogue, 3, folder),
        seed=seed,
    )


def test_of_the_hidden_tokens_8_in_10_are_masked_1_is_any_and_1_stays() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, VOCABULARY, (4000, WIDTH))
    tokens[:, 0] = SPECIAL[2]
    lengths = generator.integers(1, WIDTH + 1, len(tokens))
    masked = TokenMasking(0.15, MASK, SPECIAL, VOCABULARY)(tokens, lengths, generator.random((len(tokens), 3, WIDTH)))
    is_target = (masked.targets != NO_TARGET).numpy()
    may_be = (np.arange(WIDTH) < lengths[:, None]) & (np.arange(WIDTH) > 0)
    assert not is_target[~may_be].any()
    assert is_target[may_be].mean() == pytest.approx(0.15, abs=0.01)
    assert (masked.tokens.numpy()[~is_target] == tokens[~is_target]).all()
    assert (masked.targets.numpy()[is_target] == tokens[is_target]).all()
    shown = masked.tokens.numpy()[is_target]
    stays = shown == tokens[is_target]
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert stays.mean() == pytest.approx(0.1, abs=0.02)
    others = shown[~stays & (shown != MASK)]
    assert others.min() < 50
    assert others.max() > VOCABULARY - 50


def test_without_a_mask_token_each_token_follows_from_those_before() -> None:
    tokens = np.array([[11, 12, 13, 14], [21, 22, 0, 0], [31, 0, 0, 0]])
    masked = TokenMasking(0.15, None, SPECIAL, VOCABULARY)(tokens, np.array([4, 2, 1]), np.zeros((3, 3, 4)))
    assert masked.tokens.tolist() == tokens.tolist()
    assert masked.targets.tolist() == [
        [12, 13, 14, NO_TARGET],
        [22, NO_TARGET, NO_TARGET, NO_TARGET],
        [NO_TARGET] * 4,
    ]


def test_a_draw_depends_on_seed_epoch_and_item_alone(dataset: Dataset, tmp_path: Path) -> None:
    collate = make_collator(dataset, tmp_path)
    items = collate.split.trained[:30].astype(np.int64)

    def draws(collate: TextCollator, items: np.ndarray, epoch: int) -> dict[int, tuple[int, list[int]]]:
        batch = collate(items, epoch)
        assert batch.masked is not None
        assert batch.pairs is not None
        targets = [[value for value in row if value != NO_TARGET] for row in batch.masked.targets.tolist()]
        return dict(zip(items.tolist(), zip(batch.pairs.partners.tolist(), targets, strict=True), strict=True))

    first = draws(collate, items, 0)
    assert draws(collate, items[7:0:-1].copy(), 0) == {item: first[item] for item in items[7:0:-1].copy().tolist()}
    for other in (draws(collate, items, 1), draws(make_collator(dataset, tmp_path, seed=1), items, 0)):
        assert sum(first[item] == other[item] for item in first) < len(first) / 3


def test_partners_are_drawn_by_how_often_they_were_taken_together_and_never_from_those_held_out(dataset: Dataset, tmp_path: Path) -> None:
    collate = make_collator(dataset, tmp_path)
    assert collate.partners is not None
    held_out = set(collate.split.held_out.tolist())
    known, counts = collate.partners.of(np.arange(1, dataset.manifest.num_items + 1))
    item = 1 + int(np.argmax([sum(partner in held_out for partner in row) for row in known.tolist()]))
    weights = {
        partner: count
        for partner, count in zip(known[item - 1].tolist(), counts[item - 1].tolist(), strict=True)
        if partner and partner not in held_out
    }
    drawn: Counter[int] = Counter()
    for epoch in range(3000):
        pairs = collate(np.array([item]), epoch).pairs
        assert pairs is not None
        drawn.update(pairs.partners.tolist())
    assert drawn.keys() == weights.keys()
    for partner, weight in weights.items():
        assert drawn[partner] / 3000 == pytest.approx(weight / sum(weights.values()), abs=0.035)
    validation = collate(collate.split.held_out, VALIDATION).pairs
    assert validation is not None
    assert held_out & set(validation.partners.tolist()), "what is held out may be found among what is held out"


def test_the_texts_are_split_by_a_hash(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = ItemFeatures.read(dataset)
    catalogue = replace(catalogue, has_text=catalogue.has_text.clone())
    catalogue.has_text[torch.tensor([5, 6])] = False
    split = TextSplit.read(dataset, catalogue, tmp_path)
    told = set(range(1, 121)) - {5, 6}
    assert len(split.held_out) == 118 // 5
    assert sorted([*split.held_out.tolist(), *split.trained.tolist()]) == sorted(told)
    assert set(np.array(sorted(told))[split.is_held_out(np.array(sorted(told)))].tolist()) == set(split.held_out.tolist())


def test_a_catalogue_without_texts_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = ItemFeatures.read(dataset)
    catalogue = replace(catalogue, has_text=catalogue.has_text.clone())
    catalogue.has_text[5:] = False
    with pytest.raises(UserError, match="has 4 items with text; pretraining needs 5 or more"):
        TextSplit.read(dataset, catalogue, tmp_path)


def test_no_items_give_a_batch_that_counts_for_nothing(dataset: Dataset, tmp_path: Path) -> None:
    for masking in (None, TokenMasking(0.15, None, SPECIAL, VOCABULARY)):
        batch = make_collator(dataset, tmp_path, masking=masking)(np.zeros(0, np.int64), 0)
        assert batch.sample_ids.tolist() == [0]
        assert batch.valid_counts().tolist() == [0.0, 0.0]
