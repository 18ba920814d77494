"""The page of disagreements: what it says is what the code measures, and what each measurement must show."""

from __future__ import annotations

import re

import pytest

from sigma_lite.lab import claims
from sigma_lite.lab.disagreements import ENTRIES, PAGE, page

NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def said() -> str:
    return page()


def other_numbers(written: str, said: str) -> list[tuple[str, str]]:
    """Whole numbers that differ, and others by more than one in the last digit: sums differ a little between machines."""
    pairs = zip(NUMBER.findall(written), NUMBER.findall(said), strict=True)
    return [(was, now) for was, now in pairs if abs(float(was) - float(now)) > _digit(was)]


def _digit(number: str) -> float:
    return 1.01 * 10.0 ** -len(number.partition(".")[2]) if "." in number else 0.0


def test_the_page_is_what_is_measured(said):
    """Word for word, and number for number. After a new recording: python -m sigma_lite.lab.disagreements"""
    written = PAGE.read_text("utf-8")
    assert NUMBER.sub("#", written) == NUMBER.sub("#", said)
    assert other_numbers(written, said) == []
    assert other_numbers(written.replace("17.4 %", "25.0 %"), said) == [("25.0", "17.4")]
    assert other_numbers(written.replace("96 experts", "95 experts"), said), "a count that is one too small is seen"


def numbers(make) -> list[float]:
    return [float(found) for found in NUMBER.findall(make().found)]


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (claims.blind_spot, [96, 1.0, 1.0]),
        (claims.k_or_one, [2, 1.0, 2.0]),
        (claims.a_quarter, [0.650, 0.537, 0.113, 17.4]),
        (claims.micro_or_global, [8, 1.0, 1, 2.0, 1.0]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_closed_forms(make, first):
    assert numbers(make)[: len(first)] == pytest.approx(first, abs=5e-4)


def test_each_disagreement_is_one():
    """The number of one side differs from that of the other, in the direction that the page states."""
    fused = re.search(r"largest less smallest over the mean: ([\d.]+) with the mean, ([\d.]+) without", claims.no_op().found)
    assert float(fused[1]) == 0 < 0.1 < float(fused[2])
    packed = re.search(r"as they come ([\d.]+), snake ([\d.]+), lightest (\d\.\d+)", claims.ranks_unseen().found)
    assert float(packed[1]) + 0.2 < float(packed[2]) < float(packed[3])
    assert "gives all" in claims.ranks_unseen().found and " and 0." not in claims.ranks_unseen().found
    sign, proportional = re.findall(r"(\d+) %", claims.monotone().found)
    assert int(sign) > 30 > 10 > int(proportional)
    start, right, wrong, dead = re.search(
        r"tokens: (\d+) at first.*0\.01 (\d+) by.*and (\d+) by the other, with (\d+)", claims.sign_of_error().found
    ).groups()
    assert int(right) < 15 < int(start) < int(wrong) and int(dead) > 10
    released, ours = re.search(r"K = 1: ([\d.]+) as released, ([\d.]+)", claims.importance().found).groups()
    assert float(released) == 0 < float(ours)
    even, bound, reached = re.search(
        r"experts ([\d.]+) can.*below ([\d.]+); .* end at ([\d.]+)", claims.similar_rows().found
    ).groups()
    assert float(even) == 0 < float(bound) < float(reached)
    random, lbl, nothing = re.search(
        r"move ([\d.]+) .*, LBL ([\d.]+) .*, no loss ([\d.]+) ", claims.rows_of_routers().found
    ).groups()
    assert 2 * float(random) < float(lbl) < 0.5 * float(nothing)
    mean, token, even, unsure = re.search(
        r"4\.56\): (\S+) ± \S+ and (\S+) ± \S+; LBL (\S+) ± \S+ and (\S+) ± \S+\. E", claims.sure_or_even().found
    ).groups()
    assert float(token) < 1 < float(mean) < float(unsure) < float(even)
    grouped, usual = re.search(r"score ([\d.]+) grouped, ([\d.]+) as", claims.groups().found).groups()
    assert float(grouped) == 0 < float(usual) and "is refused" in claims.groups().found


def test_every_entry_of_the_module_is_on_the_page():
    made = {name for name, each in vars(claims).items() if getattr(each, "__annotations__", {}).get("return") == "Entry"}
    assert made == {make.__name__ for make in ENTRIES} and len(ENTRIES) >= 13
