"""The report in a real browser: every plot is readable in light and dark mode and on a phone, and the page makes no requests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.ingest.prepare import prepare
from recsys.report.pages import DATASET
from recsys.store import Storage
from tests.pages import assert_readable, chromium, opened
from tests.without_ray import patch_run_tasks, run_once

REAL = Path(__file__).parents[3] / "shared" / "data"
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SYNTHETIC = ["data.source=synthetic", "data.synthetic.num_users=300", "data.synthetic.num_items=80", "data.num_shards=3"]
INTERACTIONS = {"times", "splits", "kinds", "values"}
PEOPLE = {"lengths", "popularity", "periods", "new-items", "gaps", "sessions"}
FIGURES = INTERACTIONS | PEOPLE | {"rejected", "noticed"}
NEED_TIME = {"times", "periods", "new-items", "gaps", "sessions"}


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def prepared(root: Path, *overrides: str, config: Path | None = None) -> Dataset:
    made = load_config(config, [f"storage.root={root / 'store'}", *overrides])
    return prepare(made, Storage.from_config(made.storage))


def inputs_of(folder: str) -> list[str]:
    if not (REAL / folder).exists():
        pytest.skip(f"{REAL / folder} is absent")
    return ["data.source=files", f"data.folder={REAL / folder}"]


def address(dataset: Dataset) -> str:
    return Path(dataset.uri, DATASET.page_name).as_uri()


@pytest.mark.parametrize("width", [1200, 700, 390])
def test_every_plot_of_the_synthetic_report_is_readable(tmp_path: Path, browser: Browser, width: int) -> None:
    dataset = prepared(tmp_path, *SYNTHETIC)
    quiet = {name for name in ("rejected", "noticed") if not getattr(dataset.manifest, name)}
    page = opened(browser, address(dataset), width)
    assert_readable(page, FIGURES, quiet)
    assert page.locator("#checks .state").all_inner_texts() == ["pass", "pass", "pass", "pass", "note"]
    assert "300" in page.locator(".numbers").inner_text()


def test_movielens_100k(tmp_path: Path, browser: Browser) -> None:
    dataset = prepared(tmp_path, *inputs_of("ml-100k"), config=CONFIGS / "ml-100k.toml")
    page = opened(browser, address(dataset))
    assert_readable(page, FIGURES, {"rejected"})
    assert "100,000" in page.locator(".numbers").inner_text()
    assert "out_of_order" in page.locator("#noticed svg").inner_html()


def test_data_without_time_and_values_says_so(tmp_path: Path, browser: Browser) -> None:
    log = tmp_path / "events.csv"
    rows = [f"u{user},i{(user * 7 + place) % 20},{place}" for user in range(40) for place in range(8)]
    log.write_text("user_id,item_id,position\n" + "\n".join(rows) + "\n")
    page = opened(browser, address(prepared(tmp_path, f"data.events={log}")))
    assert_readable(page, FIGURES, NEED_TIME | {"values", "rejected", "noticed"})
    assert "positions, not times" in page.locator("#gaps").inner_text()
    assert "No interaction has a value" in page.locator("#values").inner_text()
    assert page.locator("#checks .state").all_inner_texts() == ["pass"] * 4


def test_beauty(tmp_path: Path, browser: Browser) -> None:
    page = opened(browser, address(prepared(tmp_path, *inputs_of("beauty"))))
    assert_readable(page, FIGURES, NEED_TIME | {"values", "rejected", "noticed"})


def test_colours_follow_day_and_night_and_can_be_read(tmp_path: Path, browser: Browser) -> None:
    dataset = prepared(tmp_path, *SYNTHETIC)
    pages = set()
    for scheme in ("light", "dark"):
        page = opened(browser, address(dataset), scheme=scheme)
        names = ("card", "ink", "muted", "pass", "note", "fail", "first", "second", "third")
        code = "names => names.map(name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim())"
        card, *colors = [luminance(color) for color in page.evaluate(code, list(names))]
        contrasts = [(max(card, color) + 0.05) / (min(card, color) + 0.05) for color in colors]
        assert min(contrasts[:5]) >= 4.5, contrasts  # text, as WCAG 2.2 has it
        assert min(contrasts[5:]) >= 3.0, contrasts  # bars and lines
        assert page.evaluate("getComputedStyle(document.querySelector('#kinds svg text')).fill") != "rgb(0, 0, 0)"
        pages.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(pages) == 2


def luminance(color: str) -> float:
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_what_comes_from_data_is_shown_and_never_run(tmp_path: Path, browser: Browser) -> None:
    kinds = ["<script>document.title='run'</script>", "<img src=x onerror=alert(1)>", "$a$ \\\\frac", "\u4e2d\u6587 kind", "&amp;"]
    folder = tmp_path / "<b>logs&"
    folder.mkdir()
    log = folder / "events.csv"
    rows = [f"u{user},i{place},{place + 1},{kinds[(user + place) % len(kinds)]}" for user in range(30) for place in range(6)]
    log.write_text("user_id,item_id,timestamp,event\n" + "\n".join(rows) + "\n")
    page = opened(browser, address(prepared(tmp_path, f"data.events={log}")))
    assert page.locator("script, img, main b").count() == 0
    assert page.title().startswith("Dataset ")
    labels = page.locator("#kinds svg text").all_text_contents()
    for kind in ("$a$ \\\\frac", "\u4e2d\u6587 kind", "&amp;", "<script>document.titl\u2026"):
        assert kind in labels
    assert_readable(page, FIGURES, {"values", "rejected", "noticed"})
