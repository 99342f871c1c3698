"""jobs.evaluate on real checkpoints with all its options, and its page in a real browser."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from jobs.evaluate import run
from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.evaluation.slices import COLD, COLD_AMONG_COLD, WARM, WARM_AMONG_WARM
from recsys.ingest.prepare import prepare
from recsys.objectives.next_item import NextItem
from recsys.report.evaluation import evaluation_page
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.loop import Trainer
from tests.distributed import run_distributed
from tests.pages import assert_readable, chromium, opened
from tests.reporters import LocalReporter
from tests.without_ray import patch_run_tasks, run_once

FIGURES = {"cold", "histories", "deciles", "groups-0", "diversity", "fairness-0"}
PREPARING = [
    "data.source=synthetic",
    "data.synthetic.num_users=600",
    "data.synthetic.num_items=120",
    "data.synthetic.mean_events=15",
    "data.num_shards=2",
    "data.withheld_items=0.15",
]
TRAINING = {
    "run.name": "shop/small",
    "model.width": 16,
    "model.text.mode": "off",
    "training.num_workers": 1,
    "training.zero_stage": 0,
    "training.epochs": 2,
    "optimizer.learning_rate": 1e-2,
}
EVALUATION = {
    "evaluation.diversity": [0.2, 0.4, 0.6],
    "evaluation.fairness_attributes": ["group"],
}


def train_here(config: Config) -> None:
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), LocalReporter(), NextItem).run()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two epochs; its last checkpoint is evaluated and compared with the first."""
    folder = tmp_path_factory.mktemp("evaluation")
    made = load_config(None, [f"storage.root={folder / 'store'}", f"run.scratch={folder / 'scratch'}", *PREPARING])
    storage = Storage.from_config(made.storage)
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        dataset = prepare(made, storage)
    trained = made.with_values({**TRAINING, "data.dataset": dataset.uri})
    run_distributed(train_here, 1, trained)
    store = CheckpointStore(storage, trained, dataset)
    first, last = (store.uri(step) for step in store.steps())
    return trained.with_values(
        {**EVALUATION, "evaluation.checkpoint": last, "evaluation.compare": first, "evaluation.fairness_curve": [first]}
    )


@pytest.fixture(scope="module")
def result(config: Config) -> dict[str, Any]:
    found = run(config)
    parsed: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))  # all that is printed is JSON
    return parsed


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_what_is_printed(result: dict[str, Any], config: Config) -> None:
    assert {"split", "protocol", "num_users", "metrics", "baselines", "slices", "fairness", "diversity", "compare", "curve"} < result.keys()
    metrics = result["metrics"]
    for name, (low, high) in result["interval_95"].items():
        assert low <= metrics[name] <= high, name
    assert {"ndcg@10", "novelty@5", "popularity_percentile@20", "intra_list_diversity@10", "like.auc", "rating.rmse"} < result[
        "interval_95"
    ].keys()
    for name, numbers in result["baselines"].items():
        assert numbers.keys() <= metrics.keys(), name
    assert result["baselines"]["popularity"]["popularity_lift@10"] > metrics["popularity_lift@10"]
    slices = result["slices"]
    assert slices[COLD]["num_users"] == slices[COLD_AMONG_COLD]["num_users"] == result["num_users"] - slices[WARM]["num_users"]
    assert slices[COLD_AMONG_COLD]["random"]["hr@10"] > 3 * slices[COLD]["random"]["hr@10"]
    assert slices[WARM_AMONG_WARM]["hr@10"] >= slices[WARM]["hr@10"]
    compared = result["compare"]
    assert compared["checkpoint"] == config.evaluation.compare
    assert compared["metrics"]["ndcg@10"]["difference"] == pytest.approx(metrics["ndcg@10"] - compared["metrics"]["ndcg@10"]["other"])
    own, other = result["curve"]
    assert own["ndcg@10"] == metrics["ndcg@10"]
    assert other["ndcg@10"] == compared["metrics"]["ndcg@10"]["other"]
    assert own["gaps"] == {"group": result["fairness"]["group"]["gap"]}
    assert result["diversity"]["curve"][0]["ndcg@10"] == pytest.approx(metrics["ndcg@10"])


def test_the_same_evaluation_again_gives_the_same_page(config: Config, result: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        again = run(config)
    assert json.loads(json.dumps(again)) == result
    found = result["compare"]["metrics"]["ndcg@10"]
    assert f"against {found['other']:.4f} of {config.evaluation.compare}: {found['difference']:+.4f}" in caplog.text
    page = Path(again["report"])
    assert page.parent.parent == Path(config.storage.root, "runs/shop/small/evaluations")
    assert len(list(page.parent.parent.rglob("*.html"))) == 1


@pytest.mark.parametrize("width", [1200, 700, 390])
def test_every_plot_is_readable(browser: Browser, result: dict[str, Any], width: int) -> None:
    page = opened(browser, Path(result["report"]).as_uri(), width, "dark" if width == 700 else "light")
    assert_readable(page, FIGURES, set())
    assert f"{result['metrics']['ndcg@10']:.4f}" in page.locator(".numbers").inner_text()
    text = page.locator("main").text_content()
    for number in (result["baselines"]["popularity"]["hr@20"], result["compare"]["metrics"]["hr@10"]["p"], result["slices"][COLD]["hr@10"]):
        assert f"{number:.4f}" in text


def test_a_plain_evaluation_says_what_could_be_asked_for(browser: Browser, config: Config) -> None:
    plain = run(config.with_values({"evaluation.compare": "", "evaluation.fairness_curve": [], "evaluation.diversity": []}))
    assert not {"compare", "curve", "diversity"} & plain.keys()
    page = opened(browser, Path(plain["report"]).as_uri())
    assert_readable(page, FIGURES - {"fairness-0"} | {"fairness"}, {"diversity", "fairness"})
    assert "evaluation.diversity" in page.locator("#diversity").inner_text()


def test_bounds_of_unlike_rates_are_told_apart(browser: Browser, result: dict[str, Any], tmp_path: Path) -> None:
    point, bound = result["curve"][0], {"attribute": "group", "max_gap": 0.0}
    bounds = [None, {**bound, "dual_rate": 0.5}, {**bound, "dual_rate": 2.0}]
    curve = [{**point, "bound": each, "gaps": {"group": 0.1 / (1 + number)}} for number, each in enumerate(bounds)]
    (tmp_path / "curve.html").write_text(evaluation_page({**result, "curve": curve}))
    drawn = opened(browser, (tmp_path / "curve.html").as_uri()).locator("#fairness-0 svg text").all_text_contents()
    assert {"no bound", "0, rate 0.5", "0, rate 2"} <= set(drawn)


def test_what_comes_from_data_is_shown_and_never_run(browser: Browser, result: dict[str, Any], tmp_path: Path) -> None:
    bad = "<script>document.title='run'</script>"
    groups = {f"{bad}{number}": group for number, group in enumerate(result["fairness"]["group"]["groups"].values())}
    odd = {
        **result,
        "checkpoint": f"/store/{bad}",
        "slices": {**result["slices"], f"group {bad}": result["slices"][WARM]},
        "fairness": {bad: {**result["fairness"]["group"], "groups": groups}},
        "curve": [{**point, "gaps": {bad: 0.1}} for point in result["curve"]],
    }
    (tmp_path / "odd.html").write_text(evaluation_page(odd))
    page = opened(browser, (tmp_path / "odd.html").as_uri())
    assert page.locator("script").count() == 0
    assert bad in page.locator("#groups-0 h3").inner_text()
