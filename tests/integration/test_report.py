"""The report in a real browser: every plot is there and readable, by day, by night and on a phone, and nothing leaves the page."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.data.prepare import prepare
from recsys.data.preparing.report.page import REPORT_NAME
from recsys.storage import Storage
from tests.without_ray import patch_run_tasks, run_once

REAL = Path(__file__).parents[3] / "shared" / "data"
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SYNTHETIC = ["data.source=synthetic", "data.synthetic.num_users=300", "data.synthetic.num_items=80", "data.num_shards=3"]
INTERACTIONS = {"times", "splits", "kinds", "values"}
PEOPLE = {"lengths", "popularity", "periods", "new-items", "gaps", "sessions"}
FIGURES = INTERACTIONS | PEOPLE | {"rejected", "noticed"}
NEED_TIME = {"times", "periods", "new-items", "gaps", "sessions"}
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
BOXES = """() => [...document.querySelectorAll('figure')].map(figure => {
  const plot = figure.querySelector('svg, .nothing'), box = plot.getBoundingClientRect(), outer = figure.getBoundingClientRect();
  const edges = each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const texts = [...plot.querySelectorAll('text')].filter(each => each.textContent.trim());
  return { id: figure.id, kind: plot.tagName.toLowerCase(), width: box.width, height: box.height,
    outer: edges(figure), label: plot.getAttribute('aria-label'), title: plot.querySelector('title')?.textContent,
    texts: texts.map(each => ({ text: each.textContent, box: edges(each),
      size: parseFloat(getComputedStyle(each).fontSize) * plot.getScreenCTM().a })) };
})"""


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def prepared(root: Path, *overrides: str, config: Path | None = None) -> Dataset:
    made = load_config(config, [f"storage.root={root / 'store'}", *overrides])
    return prepare(made, Storage.from_config(made.storage))


def inputs_of(folder: str) -> list[str]:
    if not (REAL / folder).exists():
        pytest.skip(f"{REAL / folder} is absent")
    return ["data.source=files", f"data.folder={REAL / folder}"]


def opened(browser: Browser, dataset: Dataset, width: int = 1200, scheme: Any = "light") -> Page:
    """Open a report; what it asks for and what the browser has to say of it end the test."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    address = Path(dataset.uri, REPORT_NAME).as_uri()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != address else None)
    page.goto(address, wait_until="networkidle")
    assert said == []
    return page


def assert_readable(page: Page, without: set[str]) -> None:
    """Every figure has its size, its labels lie within it and apart, and nothing needs scrolling sideways."""
    figures = {figure["id"]: figure for figure in page.evaluate(BOXES)}
    assert figures.keys() == FIGURES
    for name, figure in figures.items():
        assert figure["kind"] == ("p" if name in without else "svg"), name
        assert figure["width"] > 200, name
        assert figure["height"] > 60, name
        if name not in without:
            assert figure["label"] == figure["title"]
            assert figure["label"]
            assert figure["texts"], name
        for text in figure["texts"]:
            assert text["size"] >= 9, (name, text)
            assert figure["outer"][0] <= text["box"][0] < text["box"][2] <= figure["outer"][2], (name, text)
        for place, first in enumerate(figure["texts"]):
            for second in figure["texts"][place + 1 :]:
                assert not overlap(first["box"], second["box"]), (name, first, second)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))


def overlap(first: list[float], second: list[float]) -> bool:
    slack = 2.0  # boxes of text are taller than its letters
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return wide > slack and high > slack


@pytest.mark.parametrize("width", [1200, 700, 390])
def test_every_plot_of_the_synthetic_report_is_readable(tmp_path: Path, browser: Browser, width: int) -> None:
    dataset = prepared(tmp_path, *SYNTHETIC)
    quiet = {name for name in ("rejected", "noticed") if not getattr(dataset.manifest, name)}
    page = opened(browser, dataset, width)
    assert_readable(page, quiet)
    assert page.locator("#checks .state").all_inner_texts() == ["pass", "pass", "pass", "pass", "note"]
    assert "300" in page.locator(".numbers").inner_text()


def test_movielens_100k(tmp_path: Path, browser: Browser) -> None:
    dataset = prepared(tmp_path, *inputs_of("ml-100k"), config=CONFIGS / "ml-100k.toml")
    page = opened(browser, dataset)
    assert_readable(page, {"rejected"})
    assert "100,000" in page.locator(".numbers").inner_text()
    assert "out_of_order" in page.locator("#noticed svg").inner_html()


def test_data_without_time_and_values_says_so(tmp_path: Path, browser: Browser) -> None:
    log = tmp_path / "events.csv"
    rows = [f"u{user},i{(user * 7 + place) % 20},{place}" for user in range(40) for place in range(8)]
    log.write_text("user_id,item_id,position\n" + "\n".join(rows) + "\n")
    page = opened(browser, prepared(tmp_path, f"data.events={log}"))
    assert_readable(page, NEED_TIME | {"values", "rejected", "noticed"})
    assert "positions, not times" in page.locator("#gaps").inner_text()
    assert "No interaction has a value" in page.locator("#values").inner_text()
    assert page.locator("#checks .state").all_inner_texts() == ["pass"] * 4


def test_beauty(tmp_path: Path, browser: Browser) -> None:
    page = opened(browser, prepared(tmp_path, *inputs_of("beauty")))
    assert_readable(page, NEED_TIME | {"values", "rejected", "noticed"})


def test_colours_follow_day_and_night_and_can_be_read(tmp_path: Path, browser: Browser) -> None:
    dataset = prepared(tmp_path, *SYNTHETIC)
    pages = set()
    for scheme in ("light", "dark"):
        page = opened(browser, dataset, scheme=scheme)
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
    page = opened(browser, prepared(tmp_path, f"data.events={log}"))
    assert page.locator("script, img, main b").count() == 0
    assert page.title().startswith("Dataset ")
    labels = page.locator("#kinds svg text").all_text_contents()
    for kind in ("$a$ \\\\frac", "\u4e2d\u6587 kind", "&amp;", "<script>document.titl\u2026"):
        assert kind in labels
    assert_readable(page, {"values", "rejected", "noticed"})
