"""The pages as a browser shows them: at desktop and phone width, on light and dark screens, and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = 1280, 390
DRAWN = """
[...document.querySelectorAll('.chart svg')].map(svg => ({
  shown: svg.getBoundingClientRect().width > 0,
  width: svg.getBoundingClientRect().width,
  height: svg.getBoundingClientRect().height,
  inked: [...svg.querySelectorAll('path')].filter(path => path.getBoundingClientRect().width > 0).length,
  narrow: svg.parentElement.className,
}))
"""
COLOURS = """
({ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  label: getComputedStyle(document.querySelector('.chart svg text')).fill,
  wrong: [...document.querySelectorAll('svg *')].filter(item => /var\\(/.test(getComputedStyle(item).fill)).length})
"""
OUTSIDE = """
[...document.querySelectorAll('body *')].filter(item => {
  const box = item.getBoundingClientRect();
  return box.right > innerWidth + 1 && !item.closest('.scroll') && !item.closest('svg');
}).map(item => item.outerHTML.slice(0, 200))
"""


@pytest.fixture(scope="module")
def files(pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for kind, text in pages.items():
        (folder / f"{kind}.html").write_text(text, encoding="utf-8")
    return {kind: folder / f"{kind}.html" for kind in pages}


def complaints(browser: Any) -> list[Any]:
    """What the browser's console says, and what it fetched besides the page."""
    loud = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    said = [event for event in browser.events if event.get("method") in loud]
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"
    ]
    return said + asked[1:]


@pytest.mark.parametrize("kind", ["plan", "run", "measurement", "diagnosis"])
def test_it_is_shown_as_it_should_be(browser: Any, files: dict[str, Path], kind: str) -> None:
    for width, dark in ((DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)):
        browser.open(files[kind], width, dark)
        assert complaints(browser) == []
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value(OUTSIDE) == []
        drawn = browser.value(DRAWN)
        shown = [chart for chart in drawn if chart["shown"]]
        assert 2 * len(shown) == len(drawn) > 0
        for chart in shown:
            assert chart["narrow"] == ("narrow" if width == PHONE else "wide")
            assert 300 < chart["width"] <= width
            assert chart["height"] > 80
            assert chart["inked"] >= 3
        colours = browser.value(COLOURS)
        assert colours["ground"] == ("rgb(18, 21, 26)" if dark else "rgb(255, 255, 255)")
        assert colours["label"] != colours["ground"]
        assert colours["wrong"] == 0


def test_on_paper_it_is_light_and_all_of_it_is_there(browser: Any, files: dict[str, Path]) -> None:
    browser.open(files["plan"], DESKTOP, True)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[scheme])
    try:
        assert browser.value(COLOURS)["ground"] == "rgb(255, 255, 255)"
        hidden = (
            "[...document.querySelectorAll('.fold > :not(summary, .caption)')].filter(item => !item.checkVisibility()).length"
        )
        assert browser.value("document.querySelectorAll('.fold:not([open])').length") > 0
        assert browser.value(hidden) == 0
        assert len(browser.call("Page.printToPDF")["data"]) > 10_000
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_names_run_nothing(browser: Any, hostile_pages: dict[str, str], tmp_path: Path) -> None:
    for kind, text in hostile_pages.items():
        file = tmp_path / f"{kind}.html"
        file.write_text(text, encoding="utf-8")
        browser.open(file, PHONE, False)
        assert complaints(browser) == []
        assert browser.value("document.querySelectorAll('script, img').length") == 0
        assert browser.value("document.documentElement.scrollWidth") <= PHONE
