"""The drawings of the chapters: ink of their page, colours of the house, words that can be read in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sigma_lite.figures import style

PICTURES = sorted((Path(__file__).parents[1] / "notebooks" / "pictures").glob("*.svg"))
LIGHT, DARK = {"#1c2126", "#1a69a3", "#00704f", "#b34700"}, {"#e4e7ea", "#6db6f2", "#3fc79a", "#f2914a"}  # of words
picture = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("inks", "paper"), [(LIGHT, style.LIGHT_PAPER), (DARK, style.DARK_PAPER)], ids=["light", "dark"])
def test_words_have_a_contrast_of_four_and_a_half(inks, paper):
    for ink in inks:
        dark, bright = sorted((luminance(ink), luminance(paper)))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, ink


@picture
def test_words_take_the_ink_of_the_theme_and_shapes_the_colours_of_the_house(path):
    text = path.read_text("utf-8")
    head, own = re.match(r"<svg[^>]*>", text)[0], re.search(r"<style>(.*?)</style>", text, flags=re.S)[1]
    assert 'fill="currentColor"' in head and 'role="img"' in head
    light, dark = own.split("@media(prefers-color-scheme:dark)")
    assert set(re.findall(r"#\w{6}", light)) == LIGHT and set(re.findall(r"#\w{6}", dark)) == DARK
    rest = text.replace(own, "")
    assert set(re.findall(r"#[0-9a-f]{6}", rest, flags=re.I)) <= set(style.SERIES)
    assert not re.findall(r"<t(?:ext|span)[^>]* fill=", rest), "words: class blue, green or orange, or the page's ink"


@picture
def test_ids_begin_with_the_file_for_a_page_holds_many_drawings(path):
    text = path.read_text("utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert all(name.startswith(f"{path.stem}-") for name in ids) and len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
