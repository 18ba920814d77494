"""Every page of the book at two widths in two themes: nothing fails, is cut off, scrolls sideways or cannot be read."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import synthetic_results
import synthetic_run

from sigma_lite.lab.family import BASE, PROTOCOL
from sigma_lite.lab.search_page import write_search_page
from sigma_lite.lab.show import write_page
from sigma_lite.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")

# a page is opened once, and then shown in these; axe, which takes longest, sees two of the four
VIEWS = [(1280, "light", True), (1280, "dark", False), (390, "light", False), (390, "dark", True)]
SETTLED = """([width, theme]) => innerWidth === width && (document.documentElement.dataset.theme ?? theme) === theme
  && [...document.querySelectorAll('.plot')].every(plot => Math.abs(plot._fullLayout.width - plot.clientWidth) < 2)
  && [...document.querySelectorAll('.pst-scrollable-table-container')].every(
    box => box.scrollWidth <= box.clientWidth || box.tabIndex === 0)"""  # the theme waits a moment after a resize

# What scrolls sideways: code, and the page itself. Equations, tables and drawings may, inside a box of their own.
SIDEWAYS = """() => [...document.querySelectorAll('pre'), document.scrollingElement]
  .filter(box => box.clientWidth && box.scrollWidth > box.clientWidth + 1)
  .map(box => `scrolls by ${box.scrollWidth - box.clientWidth}: ${box.innerText.trim().slice(0, 60)}`)"""

# Text of a figure that is cut at its edge, labels of one axis that run into each other, and plots that have no room left.
FIGURES = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
  const faults = [], edge = plot.getBoundingClientRect(), name = plot.getAttribute('aria-label');
  const boxes = (where) => [...plot.querySelectorAll(where)]
    .filter(text => text.textContent.trim() && getComputedStyle(text).visibility !== 'hidden')
    .map(text => [text.getBoundingClientRect(), text.textContent]).filter(([box]) => box.width);
  for (const [box, text] of boxes('.main-svg text'))
    if (box.right > edge.right + 2 || box.left < edge.left - 2) faults.push(`cut: ${text}`);
  const labels = boxes(".xtick text:not([transform*='rotate(']), .xtick text[transform*='rotate(0']");
  for (const [one, other] of labels.slice(1).map((label, i) => [labels[i], label]))
    if (one[0].right > other[0].left + 1 && one[0].left < other[0].right && Math.abs(one[0].top - other[0].top) < 4)
      faults.push(`overlap: ${one[1]} and ${other[1]}`);
  if (plot._fullLayout._size.w < 150) faults.push(`${Math.round(plot._fullLayout._size.w)} pixels wide`);
  if (!name) faults.push('no name');
  return faults.map(fault => `${name}: ${fault}`);
})"""

AXE = """async () => {
  const found = await axe.run(document, {preload: false, resultTypes: ['violations']});
  return found.violations.filter(one => ['serious', 'critical'].includes(one.impact))
    .map(one => `${one.id}: ${one.nodes.length} times, first ${one.nodes[0].html.slice(0, 200)}`);
}"""


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_playwright_python", reason="the package axe-playwright-python brings axe-core")
    return (resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")


def faults_of(page, path: Path, axe: str) -> list[str]:
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.evaluate(axe)
    found = []
    for width, theme, everything in VIEWS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")  # axe must not see a colour on its way
        while not page.evaluate(SETTLED, [width, theme]):  # wait_for_function needs eval, which the report forbids
            page.wait_for_timeout(50)
        seen = [*page.evaluate(SIDEWAYS), *page.evaluate(FIGURES), *(page.evaluate(AXE) if everything else [])]
        found += [f"{width} {theme}: {fault}" for fault in seen]
    return found


def test_every_page_of_the_book(page, site, axe):
    """Also: asks the network for nothing, and finds each file that it names. A file: request that fails is silent."""
    missing = []
    page.on("requestfailed", lambda request: missing.append((request.url, request.failure)))
    first = site / "index.html"  # leads on to the book's own at once
    pages = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts and path != first)
    assert len(pages) > len(list((site / "notebooks").glob("*.html"))) + 6, "the reference pages too"
    assert {path.name: found for path in pages if (found := faults_of(page, path, axe))} == {}
    assert page.requests == [] and page.faults == []
    assert [url for url, why in missing if why != "net::ERR_ABORTED"] == []  # we leave before some have ended


def test_report_and_pages_of_the_lab(page, axe, tmp_path):
    report = write_report(synthetic_run.write(tmp_path / "run", synthetic_run.entries(steps=200, n_windows=10, switch=140)))
    made = synthetic_results.results((BASE, "nine"), (0, 1)) | {"experiment": "family", "protocol": PROTOCOL}
    (tmp_path / "family-quick.json").write_text(json.dumps(made))
    searched = shutil.copytree(Path(__file__).parents[2] / "results" / "search", tmp_path / "search")
    for path in (report, write_page([tmp_path / "family-quick.json"]), write_search_page(searched)):
        assert faults_of(page, path, axe) == []
    assert page.requests == [] and page.faults == []
