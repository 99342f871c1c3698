"""Pure functions: which checkpoints are kept, what may change when a run resumes, when a run is finished, and the learning rate."""

from itertools import pairwise

import pytest

from recsys.config import load_config
from recsys.train.checkpoints.checkpoint_store import superfluous_steps
from recsys.train.checkpoints.manifest import config_differences, steps_in
from recsys.train.engine import learning_rate_factor
from recsys.train.loop import is_saving_step, planned_steps
from recsys.train.monitoring.reporter import Request
from recsys.train.state import TrainingState


@pytest.mark.parametrize(
    ("steps", "best", "keep", "expected"),
    [([10, 20, 30], None, 2, [10]), ([10, 20, 30], 10, 2, []), ([30, 10, 20, 40], 20, 1, [10, 30]), ([10], None, 3, []), ([], None, 1, [])],
)
def test_the_last_and_the_best_are_kept(steps: list[int], best: int | None, keep: int, expected: list[int]) -> None:
    assert superfluous_steps(steps, best, keep) == expected


def test_what_may_change_on_a_resume_and_what_may_not() -> None:
    saved = load_config().model_dump(mode="json")
    allowed = load_config(
        None, ["training.epochs=99", "run.name=other", "checkpoint.keep_last=5", "service.port=1", "evaluation.split=validation"]
    )
    assert config_differences(saved, allowed.model_dump(mode="json")) == []
    former = saved | {"evaluation": {"curve" if key == "fairness_curve" else key: value for key, value in saved["evaluation"].items()}}
    assert config_differences(former, allowed.model_dump(mode="json")) == []
    earlier = {**saved, "data": {key: value for key, value in saved["data"].items() if key not in ("kinds", "max_exposures")}}
    assert config_differences(earlier, allowed.model_dump(mode="json")) == []
    kinds = load_config(None, ["data.kinds.buy.weight=2"]).model_dump(mode="json")
    assert config_differences(earlier, kinds)[0].startswith("data.kinds")
    refused = load_config(None, ["model.width=32", "optimizer.learning_rate=0.5", "data.max_history=7"]).model_dump(mode="json")
    assert config_differences(saved, refused) == [
        "data.max_history: 50 -> 7",
        "model.width: 64 -> 32",
        "optimizer.learning_rate: 0.001 -> 0.5",
    ]


def test_a_run_is_finished_by_epochs_steps_or_no_improvement() -> None:
    config = load_config(None, ["training.epochs=3", "training.max_steps=100", "training.early_stopping_patience=2"])
    assert not TrainingState(epoch=2, step=99, epochs_without_improvement=1).is_finished(config)
    assert TrainingState(epoch=3).is_finished(config)
    assert TrainingState(step=100).is_finished(config)
    assert TrainingState(epochs_without_improvement=2).is_finished(config)


def test_an_epochs_last_step_is_saved_with_its_validation_unless_it_is_asked_for() -> None:
    states = [TrainingState(step=step, step_in_epoch=(step - 1) % 6 + 1) for step in range(1, 13)]
    assert [state.step for state in states if is_saving_step(state, 6, 3, Request.NONE)] == [3, 9]
    for request in (Request.SAVE, Request.STOP):
        assert [state.step for state in states if is_saving_step(state, 6, 3, request)] == list(range(1, 13))


def test_what_is_not_named_as_a_checkpoint_is_none() -> None:
    folder = "s3://bucket/runs/a/checkpoints"
    names = ["step-00000010/manifest.json", "step-00000010-copy/manifest.json", "notes.txt", "step-123456789/x/y", "step-1/manifest.json"]
    assert steps_in(f"{folder}/{name}" for name in names) == {10, 123456789}


def test_the_best_validation_is_remembered() -> None:
    state = TrainingState(step=10)
    for step, metric in ((10, 0.1), (20, 0.3), (30, 0.2), (40, 0.3)):
        state.step = step
        state.record_validation({"ndcg@10": metric}, "ndcg@10")
    assert (state.best_metric, state.best_step, state.epochs_without_improvement) == (0.3, 20, 2)


def test_warm_up_then_cosine() -> None:
    config = load_config(None, ["optimizer.warmup_steps=10", "optimizer.final_fraction=0.1"])
    factors = [learning_rate_factor(config, step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(before >= after for before, after in pairwise(factors[10:]))


def test_planned_steps() -> None:
    assert planned_steps(load_config(None, ["training.epochs=3"]), 7) == 21
    assert planned_steps(load_config(None, ["training.epochs=3", "training.max_steps=5"]), 7) == 5


def test_the_state_of_release_0_1_is_read() -> None:
    old = TrainingState(step=7).model_dump(mode="json")
    del old["objective"]
    assert TrainingState.model_validate(old | {"duals": [0.5, 0.0]}).objective == {"duals": [0.5, 0.0]}
    assert TrainingState.model_validate(old | {"duals": []}) == TrainingState(step=7, objective={"duals": []})
