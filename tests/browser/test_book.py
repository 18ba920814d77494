"""The built pages, opened from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHAPTERS = sorted(path.stem for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
sync_api.expect.set_options(timeout=240_000)

SHOWN = """Array.from(document.querySelectorAll('.sigma-figure')).map(figure => ({
  drawn: figure.querySelectorAll('.main-svg').length > 0,
  marks: figure.querySelectorAll('.mlayer path, .mlayer image, .cell-text').length, // the last: of a table
}))"""
SET = "document.querySelector('mjx-container') !== null || document.querySelector('.math') === null"
# Of a figure: what its traces are, and all that plotly has drawn from them: bars, dots and lines are layers of their own.
STATE = """figure => [
  JSON.stringify(figure._fullData.map(trace => [trace.visible, trace.name])),
  Array.from(figure.querySelectorAll('.mlayer')).map(layer => layer.innerHTML).join(),
]"""
MOVED = f"([figure, before]) => ({STATE})(figure).every((part, i) => part !== before[i])"
FAR_END = """figure => {
  const slider = figure._fullLayout.sliders[0];
  return slider.active < slider.steps.length / 2 ? 0.98 : 0.02;
}"""


def pages(site: Path) -> list[Path]:
    """All but the first, which leads on to the book's own index at once."""
    return [path for path in site.rglob("*.html") if "_static" not in path.parts and path != site / "index.html"]


def test_first_page_leads_to_the_book(page, site):
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert page.locator("article h1").first.inner_text().startswith("sigma_lite")
    assert page.requests == []


def test_no_page_asks_the_network(page, site):
    for path in pages(site):
        page.goto(path.as_uri(), wait_until="networkidle")
    assert page.requests == []
    assert page.faults == []
    assert len(pages(site)) > len(CHAPTERS) + 6  # the reference pages too


def test_every_page_loads_what_it_names(page, site):
    """A file: request that fails is silent; a page without its style or script is not. We leave before some have ended."""
    missing = []
    page.on("requestfailed", lambda request: missing.append((request.url, request.failure)))
    for path in pages(site):
        page.goto(path.as_uri(), wait_until="networkidle")
    assert [url for url, why in missing if why != "net::ERR_ABORTED"] == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_its_figures(page, site, chapter):
    page.goto((site / "notebooks" / f"{chapter}.html").as_uri())
    page.wait_for_function(f"{SHOWN}.every(figure => figure.drawn && figure.marks > 0)")
    assert len(page.evaluate(SHOWN)) >= 3
    page.wait_for_function(SET)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_slider_moves_its_figure_without_a_kernel(page, site, chapter):
    page.goto((site / "notebooks" / f"{chapter}.html").as_uri())
    page.wait_for_selector(".slider-rail-touch-rect", state="attached")
    figure = page.locator(".sigma-figure:has(.slider-rail-touch-rect)").first
    before = figure.evaluate(STATE)
    rail = figure.locator(".slider-rail-touch-rect")
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    page.mouse.click(box["x"] + figure.evaluate(FAR_END) * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_function(MOVED, arg=[figure.element_handle(), before])


def test_guess_is_kept_and_shown_beside_the_measurement(page, site):
    address = (site / "notebooks" / f"{CHAPTERS[0]}.html").as_uri()
    page.goto(address)
    shown = page.locator("[data-sigma-guess]").first
    assert shown.inner_text() == "none yet"
    button = page.locator("fieldset.sigma-predict input").nth(1)
    button.check()
    sync_api.expect(shown).to_have_text(button.input_value())
    page.goto(address)
    sync_api.expect(page.locator("fieldset.sigma-predict input").nth(1)).to_be_checked()
    sync_api.expect(page.locator("[data-sigma-guess]").first).to_have_text(button.input_value())


def test_folded_solution_opens(page, site):
    page.goto((site / "notebooks" / f"{CHAPTERS[0]}.html").as_uri())
    fold = page.locator("details", has=page.locator("summary", has_text="the package's")).first
    source = fold.locator("pre")
    assert not source.is_visible()
    fold.locator("summary").click()
    sync_api.expect(source).to_be_visible()
    assert "def " in source.inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(new_page, site, theme):
    """Contrast of a figure's title, and of a printed source, with the page behind them: at least 3 to 1."""
    page = new_page(color_scheme=theme)
    page.goto((site / "notebooks" / f"{CHAPTERS[1]}.html").as_uri())
    page.wait_for_selector(".gtitle", state="attached")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    colours = page.evaluate(
        """() => {
          const background = element => {
            for (; element; element = element.parentElement) {
              const colour = getComputedStyle(element).backgroundColor;
              if (!/, 0\\)$/.test(colour) && colour !== 'transparent') return colour;
            }
            return 'rgb(255, 255, 255)';
          };
          const title = document.querySelector('.gtitle');
          const words = [...document.querySelectorAll('.sigma-source pre span')].filter(s => s.textContent.trim());
          return [[getComputedStyle(title).fill, background(title.closest('.sigma-figure'))],
                  ...words.map(word => [getComputedStyle(word).color, background(word)])];
        }"""
    )
    assert len(colours) > 20
    assert min(contrast(*pair) for pair in colours) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two css colours rgb(...)."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 :].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
