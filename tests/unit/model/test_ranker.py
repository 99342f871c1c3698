"""The ranker's forms compared with plain loops over pairs, tasks and experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.config.model import ModelConfig, RankerConfig
from recsys.model.ranker import Ranker
from recsys.schema import Task

WIDTH, TASKS, PAIRS = 6, 3, 5
EVENTS = [Task(event, "binary", event) for event in ("click", "cart", "purchase")]
USERS, ITEMS, TEXTS = torch.randn(3, PAIRS, WIDTH, generator=torch.Generator().manual_seed(0))


def build(kind: str, num_experts: int = 1, has_text: bool = True, num_tasks: int = TASKS) -> Ranker:
    torch.manual_seed(1)
    ranker = Ranker(ModelConfig(width=WIDTH, ranker=RankerConfig(kind=kind, num_experts=num_experts)), EVENTS[:num_tasks], has_text)
    for parameter in ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return ranker


def plain_score(ranker: Ranker, num_experts: int, user: Tensor, item: Tensor, text: Tensor | None, task: int) -> Tensor:
    """Score one user-item pair for one task."""
    pair = torch.cat([user, item, user * item])
    experts = []
    for expert in range(num_experts):
        rows = slice(expert * WIDTH, (expert + 1) * WIDTH)
        if ranker.is_additive:
            first, second = ranker.user_experts, ranker.item_experts
            experts.append((first.weight[rows] @ user + first.bias[rows]) * (second.weight[rows] @ item + second.bias[rows]))
        else:
            experts.append(F.silu(ranker.experts.weight[rows] @ pair + ranker.experts.bias[rows]))
    gate = torch.ones(1)
    if num_experts > 1:
        logits = (ranker.mixture.weight @ pair + ranker.mixture.bias).view(num_experts, TASKS)
        gate = logits[:, task].softmax(0)
    mixed = sum(weight * expert for weight, expert in zip(gate, experts, strict=True))
    score = ranker.heads.weight[task] @ mixed + ranker.biases.weight[task] @ torch.cat([user, item]) + ranker.biases.bias[task]
    if ranker.is_additive:
        score = score + ranker.gate_sequence[task] * (user @ item)
        if text is not None:
            score = score + ranker.gate_text[task] * ((ranker.text_query.weight @ user) @ text)
    return score


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize(("kind", "has_text"), [("concatenation", True), ("additive", True), ("additive", False)])
def test_scores_are_the_formula(kind: str, has_text: bool, num_experts: int) -> None:
    ranker = build(kind, num_experts, has_text)
    scores = ranker(USERS, ITEMS, TEXTS if has_text else None)
    assert scores.shape == (PAIRS, TASKS)
    for pair in range(PAIRS):
        for task in range(TASKS):
            text = TEXTS[pair] if has_text else None
            torch.testing.assert_close(scores[pair, task], plain_score(ranker, num_experts, USERS[pair], ITEMS[pair], text, task))
    scores.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in ranker.parameters())


def test_each_term_of_the_additive_form_can_be_left_out() -> None:
    ranker = build("additive")
    whole = ranker(USERS, ITEMS, TEXTS)
    parts = {}
    for name in ("gate_text", "gate_sequence", "heads.weight"):
        one = build("additive")
        with torch.no_grad():
            one.get_parameter(name).zero_()
        parts[name] = whole - one(USERS, ITEMS, TEXTS)
    text = ranker.gate_text * (USERS @ ranker.text_query.weight.T * TEXTS).sum(1, keepdim=True)
    torch.testing.assert_close(parts["gate_text"], text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["gate_sequence"], ranker.gate_sequence * (USERS * ITEMS).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    biases = ranker.biases(torch.cat([USERS, ITEMS], 1))
    torch.testing.assert_close(sum(parts.values()) + biases, whole, rtol=1e-4, atol=1e-5)


def test_the_gates_of_the_additive_form_start_closed() -> None:
    ranker = Ranker(ModelConfig(width=WIDTH, ranker=RankerConfig(kind="additive")), EVENTS, has_text=True)
    torch.testing.assert_close(ranker(USERS, ITEMS, TEXTS), ranker(USERS, ITEMS, 0 * TEXTS))
    ranker(USERS, ITEMS, TEXTS).sum().backward()
    assert ranker.gate_text.grad.abs().min() > 0
    assert ranker.gate_sequence.grad.abs().min() > 0


def test_an_additive_ranker_that_matches_text_does_not_score_without_it() -> None:
    with pytest.raises(TypeError):
        build("additive")(USERS, ITEMS)


def test_no_tasks_give_no_scores() -> None:
    assert build("additive", num_tasks=0)(USERS, ITEMS, TEXTS).shape == (PAIRS, 0)


def test_calibration_is_the_formula() -> None:
    rates = torch.tensor([0.05, 1.0, 3.0])
    ranker = Ranker(ModelConfig(width=WIDTH), EVENTS, has_text=False, negative_rates=rates)
    scores = torch.randn(7, TASKS)
    seen = scores.sigmoid()
    torch.testing.assert_close(ranker.calibrate(scores).sigmoid(), seen / (seen + (1 - seen) / rates))
