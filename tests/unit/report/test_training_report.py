"""The report of a training run: every curve of its state, readable in a real browser, and no code from error messages is executed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from recsys.report.training import training_page
from recsys.train.failures import Failure
from recsys.train.state import Incident, TrainingState
from tests.pages import assert_readable, chromium, opened

FIGURES = {"loss-0", "loss-1", "validation", "speed", "time"}


def state_of(num_epochs: int) -> TrainingState:
    state = TrainingState(wall_seconds=120.0)
    for epoch in range(num_epochs):
        for _ in range(5):
            state.record_step({"retrieval": 4 - epoch / 5, "like": 0.7}, num_samples=16, seconds=0.5, wait_seconds=0.01)
        state.record_validation({"ndcg@10": [0.05, 0.09, 0.12, 0.11][epoch], "hr@10": 0.2}, "ndcg@10")
        state.epoch += 1
    return state


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_an_epochs_losses_are_means_over_its_samples() -> None:
    state = TrainingState()
    state.record_step({"retrieval": 4.0}, num_samples=30, seconds=1.0, wait_seconds=0.0)
    state.record_step({}, num_samples=30, seconds=0.0, wait_seconds=0.0)
    state.record_step({"retrieval": 1.0}, num_samples=10, seconds=1.0, wait_seconds=0.0)
    state.record_validation({"ndcg@10": 0.1}, "ndcg@10")
    (epoch,) = state.history
    assert epoch.losses == {"retrieval": (4.0 * 30 + 10) / 70}
    assert (epoch.step, epoch.validation, epoch.samples_per_second) == (3, 0.1, 35.0)
    assert (state.loss_sums, state.epoch_samples) == ({}, 0)


@pytest.mark.parametrize("width", [1200, 700])
def test_every_plot_is_readable(browser: Browser, tmp_path: Path, width: int) -> None:
    path = tmp_path / "training.html"
    state = state_of(4)
    cause = Failure(kind="worker_lost", message="<script>document.title = 'run'</script> gone", rank=1)
    state.incidents.append(Incident(causes=(cause,), step=7, seconds=30.5, start_seconds=6.0, load_seconds=2.0, seek_seconds=0.1))
    state.skipped_steps.append(9)
    path.write_text(training_page(state.numbers("ml-1m")), encoding="utf-8")
    page = opened(browser, path.as_uri(), width, "dark" if width == 700 else "light")
    assert_readable(page, FIGURES, set())
    assert page.title() == "Training of ml-1m"
    text = page.inner_text("main")
    assert "worker lost on rank 1: <script>" in text
    assert "30.5" in text
    assert "steps 9" in text
    assert "0.1200" in text


def test_a_run_that_ended_no_epoch_has_a_page_too(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "training.html"
    path.write_text(training_page(TrainingState(step=1, wall_seconds=3.0, train_seconds=1.0).numbers("short")), encoding="utf-8")
    assert_readable(opened(browser, path.as_uri()), {"loss-0", "validation", "speed", "time"}, {"loss-0", "validation", "speed"})
