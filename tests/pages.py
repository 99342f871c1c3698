"""Checks of a report in a real browser: it loads no other files, and all plots are present and readable."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

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


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser, or skip the test if there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, address: str, width: int = 1200, scheme: Any = "light") -> Page:
    """Open a report and assert that it causes no further requests and no console messages."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != address else None)
    page.goto(address, wait_until="networkidle")
    assert said == []
    return page


def assert_readable(page: Page, names: set[str], said: set[str]) -> None:
    """Assert that every figure is large enough, labels fit and do not overlap, figures in `said` are text, and nothing scrolls sideways."""
    figures = {figure["id"]: figure for figure in page.evaluate(BOXES)}
    assert figures.keys() == names
    for name, figure in figures.items():
        assert figure["kind"] == ("p" if name in said else "svg"), name
        assert figure["width"] > 200, name
        assert figure["height"] > 60, name
        if name not in said:
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
    """Return whether two boxes (left, top, right, bottom) overlap."""
    slack = 2.0  # text boxes are taller than the glyphs
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return wide > slack and high > slack
