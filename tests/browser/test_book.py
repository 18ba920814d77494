"""The built pages, opened from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHAPTERS = sorted(path.stem for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
sync_api.expect.set_options(timeout=240_000)

SHOWN = """Array.from(document.querySelectorAll('.sigma-figure .plot')).map(figure => ({
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


def test_first_page_leads_to_the_book(page, site):
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert page.locator("article h1").first.inner_text().startswith("sigma_lite")
    assert page.requests == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_shows_its_figures(page, site, chapter):
    page.goto((site / "notebooks" / f"{chapter}.html").as_uri())
    page.wait_for_function(f"{SHOWN}.every(figure => figure.drawn && figure.marks > 0)")
    assert len(page.evaluate(SHOWN)) >= 3
    page.wait_for_function(SET)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_slider_moves_its_figure_by_keyboard_and_without_a_kernel(page, site, chapter):
    page.goto((site / "notebooks" / f"{chapter}.html").as_uri())
    page.wait_for_function(f"{SHOWN}.every(figure => figure.drawn)")
    figure = page.locator(".sigma-figure:has(.controls input[type=range])").first
    plot, slider = figure.locator(".plot").element_handle(), figure.locator("input[type=range]")
    before, label, at = plot.evaluate(STATE), figure.locator("output").inner_text(), slider.input_value()
    slider.focus()
    page.keyboard.press("Home" if int(at) > int(slider.get_attribute("max")) / 2 else "End")
    page.wait_for_function(MOVED, arg=[plot, before])
    assert figure.locator("output").inner_text() != label
    assert slider.get_attribute("aria-valuetext") == figure.locator("output").inner_text()


def test_the_first_figure_of_the_book_is_live_and_its_title_follows(page, site):
    page.goto((site / "book" / "index.html").as_uri())
    page.wait_for_function(f"{SHOWN}.every(figure => figure.drawn)")
    title = page.locator(".sigma-figure .title").first
    before = title.inner_text()
    page.locator(".sigma-figure input[type=range]").first.focus()
    page.keyboard.press("End")
    sync_api.expect(title).not_to_have_text(before)
    cards = page.locator(".sigma-cards a")
    assert cards.count() == len(CHAPTERS) == page.locator(".sigma-cards svg").count()
    assert all((site / "book" / card.get_attribute("href")).is_file() for card in cards.all())


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
    """Contrast of a figure's words, a drawing's, and a printed source's, with the page behind them: at least 4.5 to 1."""
    page = new_page(color_scheme=theme)
    page.goto((site / "notebooks" / f"{CHAPTERS[1]}.html").as_uri())
    page.wait_for_selector(".plot .xtitle", state="attached")
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
          const drawn = [...document.querySelectorAll('.plot :is(.xtitle, .xtick text, .legendtext), .sigma-picture text')];
          const words = [...document.querySelectorAll('.sigma-source pre span')].filter(s => s.textContent.trim());
          return [...drawn.map(text => [getComputedStyle(text).fill, background(text.closest('div'))]),
                  ...words.map(word => [getComputedStyle(word).color, background(word)])];
        }"""
    )
    assert len(colours) > 40
    assert min(contrast(*pair) for pair in colours) >= 4.5


def test_figures_follow_the_theme_that_the_reader_chooses(page, site):
    page.goto((site / "book" / "index.html").as_uri())
    page.wait_for_function(f"{SHOWN}.every(figure => figure.drawn)")
    ink = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    before = page.evaluate(ink)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"{ink} !== '{before}'")


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two css colours rgb(...)."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 :].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
