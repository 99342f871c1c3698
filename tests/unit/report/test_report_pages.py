"""Every page is generated from its JSON alone, and all data is escaped."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from recsys.config import load_config
from recsys.evaluation.slices import COLD, COLD_AMONG_COLD, WARM, WARM_AMONG_WARM
from recsys.ingest.prepare import prepare
from recsys.report.__main__ import main
from recsys.report.evaluation import COLD_SLICES, evaluation_page
from recsys.report.pages import DATASET, EVALUATION, TRAINING, Report, write_report
from recsys.store import Storage
from recsys.train.failures import Failure
from recsys.train.state import Incident, TrainingState
from tests.without_ray import patch_run_tasks, run_once

EVIL = '<evil onload="x"> & \' " onload="x"'


class Elements(HTMLParser):
    """Names of elements and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}
        self.text += "".join(value or "" for name, value in attrs if name == "aria-label")

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(page: str, num_places: int) -> None:
    found = Elements(page)
    assert not found.names & {"evil", "onload", "script"}
    assert found.text.count(EVIL) >= num_places


def rates(value: float) -> dict[str, Any]:
    names = ("ndcg@10", "hr@10")
    intervals = {name: [value / 2, value] for name in names}
    return {"num_users": 40, **dict.fromkeys(names, value), "interval_95": intervals, "random": dict.fromkeys(names, 0.01)}


def evaluation(text: str = "plain") -> dict[str, Any]:
    metrics = {"ndcg@10": 0.1234, "hr@10": 0.3, "coverage@10": 0.9, "ndcg@20": 0.15, "like.auc": None, "like.num_labels": 1200}
    difference = {"value": 0.2, "other": 0.1, "difference": 0.1, "interval_95": [0.05, 0.15], "p": 0.0123}
    group = {"num_users": 40, "mean": 0.2, "interval_95": [0.1, 0.3]}
    gap = {"gap": 0.0567, "interval_95": [0.01, 0.1], "relative_gap": 0.2, "num_groups_left_out": 2}
    return {
        "checkpoint": f"runs/{text}",
        "metric": "ndcg@10",
        "split": "test",
        "protocol": f"every item ranked, {text}",
        "num_users": 1234,
        "metrics": {**metrics, text: 0.5},
        "absent_tasks": {text: text},
        "interval_95": {"ndcg@10": [0.1, 0.2]},
        "baselines": {"popularity": metrics, text: {}},
        "slices": {WARM: rates(0.3), COLD: rates(0.1), "history 1-10": rates(0.2), "popularity decile 3": rates(0.2), text: rates(0.1)},
        "fairness": {text: {"groups": {text: group, "b": group}, **gap}},
        "queries": {"protocol": text, "num_users": 3, "with_query": {text: 0.5}, "without_query": {text: 0.25}},
        "compare": {"checkpoint": text, "metrics": {"ndcg@10": difference}, "slices": {text: {"ndcg@10": difference}}},
        "diversity": {"method": "mmr", "curve": [{"weight": 0.3, "ndcg@10": 0.1, "intra_list_diversity@10": 0.5}]},
        "curve": [{"checkpoint": text, "bound": None, "ndcg@10": 0.1, "gaps": {text: 0.2}}],
    }


def training(text: str = "plain") -> dict[str, Any]:
    state = TrainingState(wall_seconds=10.0)
    state.record_step({text: 0.5}, num_samples=16, seconds=0.5, wait_seconds=0.01)
    state.record_validation({text: 0.25}, text)
    cause = Failure(kind="worker_lost", message=text, rank=1)
    state.incidents.append(Incident(causes=(cause, cause), step=7, seconds=3.5, start_seconds=1.0, load_seconds=1.0, seek_seconds=0.1))
    return state.numbers(text)


def prepared(root: Path, monkeypatch: pytest.MonkeyPatch, text: str = "plain") -> Path:
    patch_run_tasks(monkeypatch, run_once)
    events = root / f"{text[:5]}.csv"
    quoted = '"' + text.replace('"', '""') + '"'
    rows = [f"u{user},i{place},{place + 1},{quoted},1" for user in range(30) for place in range(6)]
    refused = [f"u1,{quoted},1,{quoted},1"] * 2 + [f"u1,i1,{quoted},{quoted},1"]
    events.write_text(f"user_id,item_id,timestamp,event,{quoted}\n" + "\n".join(rows + refused) + "\n")
    config = load_config(None, [f"storage.root={root / 'store'}", f"data.events={events}"])
    return Path(prepare(config, Storage.from_config(config.storage)).uri)


@pytest.mark.parametrize(("report", "numbers"), [(TRAINING, training()), (EVALUATION, evaluation())])
def test_a_page_is_drawn_again_from_its_json_alone(report: Report, numbers: dict[str, Any], tmp_path: Path) -> None:
    page = Path(write_report(Storage(str(tmp_path)), str(tmp_path), report, numbers))
    assert page == tmp_path / report.page_name
    assert_drawn_again(page, tmp_path / report.json_name)


def test_a_datasets_page_is_drawn_again_from_its_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, monkeypatch)
    assert_drawn_again(folder / DATASET.page_name, folder / DATASET.json_name)


def assert_drawn_again(page: Path, numbers: Path) -> None:
    drawn = page.read_bytes()
    page.unlink()
    main([str(numbers)])
    assert page.read_bytes() == drawn


@pytest.mark.parametrize("arguments", [[], ["absent/statistics.json"], [__file__]])
def test_only_the_json_of_a_report_can_be_drawn(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"statistics\.json or training\.json or evaluation\.json"):
        main(arguments)


def test_what_comes_from_data_is_no_markup_in_a_datasets_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, monkeypatch, EVIL)
    assert_harmless((folder / DATASET.page_name).read_text(encoding="utf-8"), 3)  # a column, and examples of two rules


def test_what_comes_from_data_is_no_markup_in_the_page_of_a_run() -> None:
    assert_harmless(TRAINING.draw(training(EVIL)), 7)  # title, run, metric, plot, plot label, and two causes


def test_what_comes_from_data_is_no_markup_in_the_page_of_an_evaluation() -> None:
    assert_harmless(EVALUATION.draw(evaluation(EVIL)), 20)


def test_missing_numbers_end_the_drawing() -> None:
    numbers = evaluation()
    del numbers["checkpoint"]
    with pytest.raises(UndefinedError, match="'checkpoint' is undefined"):
        evaluation_page(numbers)


def test_slices_are_found_by_the_names_that_the_evaluation_gives_them() -> None:
    assert set(COLD_SLICES) == {COLD, COLD_AMONG_COLD, WARM, WARM_AMONG_WARM}
