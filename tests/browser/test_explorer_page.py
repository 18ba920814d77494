"""The routing explorer's page: a layer, a token and an expert are chosen; on a phone, and in the dark."""

from __future__ import annotations

import shutil

import pytest

from sigma_lite import cli

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

LUMINANCE = """element => {
  const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(n => +n / 255);
  const light = colour => parts(colour).map(p => p <= .03928 ? p / 12.92 : ((p + .055) / 1.055) ** 2.4)
    .reduce((sum, p, i) => sum + p * [.2126, .7152, .0722][i], 0);
  const style = getComputedStyle(element), pair = [light(style.color), light(style.backgroundColor)].sort();
  return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
}"""


@pytest.fixture
def address(finished, tmp_path, monkeypatch) -> str:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    cli.main(["explore", "run", "--text", "def rule(x):\n    return x + 1\n", "--tokens", "1000"])
    return (tmp_path / "run/routing.html").as_uri()


def test_choosing_goes_from_token_to_expert_and_back(page, address):
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    token = page.locator("#text .token").nth(1)
    numbers = page.locator("#text .token small").all_inner_texts()
    assert all(number.isdigit() for number in numbers)
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-shown").inner_text() == "1"
    assert page.locator("#text .token small").all_inner_texts() != numbers
    token.click()
    chips = page.locator("#panel .chip")
    assert chips.count() == 2 and "cost" in page.locator("#panel").inner_text()
    chips.first.click()
    assert page.locator("#layer-shown").inner_text() == "0"
    expert = page.locator("#panel h3").inner_text().split()[1]
    own = page.locator("#text .token:not(.other) small").all_inner_texts()
    assert own and set(own) == {expert} and len(own) == numbers.count(expert)
    assert page.locator("#panel table").count() == 2
    page.locator("#clear").click()
    assert page.locator("#text .other").count() == 0
    page.locator("#map").click(position={"x": 26 + 2 * 15 + 5, "y": 20})
    assert page.locator("#layer-shown").inner_text() == "1" and "Position 2" in page.locator("#panel").inner_text()
    assert page.requests == [] and page.faults == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(new_page, address, width, theme):
    page = new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    page.locator("#chips .chip").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    coloured = page.locator("#text .token:not(.other)")
    assert min(coloured.nth(i).evaluate(LUMINANCE) for i in range(coloured.count())) >= 4.5
    assert page.locator("#panel h3").is_visible()
