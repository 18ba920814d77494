"""Documents that share much of their text: held out or trained on together, or the score would be for remembering."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

TELLING = 20  # characters of a line, without the spaces around it, from which on it tells where it comes from
COMMON = 20  # a line in more documents than this, such as a licence's, tells nothing
LINES, SHARE = 10, 0.2  # two documents are near if they share so many telling lines, and this share of the shorter one's


def families(texts: Mapping[str, str]) -> dict[str, str]:
    """The name of each document's family: the first member's, in the order of `texts`. Most families have one member.

    Nearness is passed on: if a is near b and b is near c, all three are one family.
    """
    parent = {name: name for name in texts}

    def first(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    place = {name: number for number, name in enumerate(texts)}
    for one, other in _near(texts):
        low, high = sorted((first(one), first(other)), key=place.__getitem__)
        parent[high] = low
    return {name: first(name) for name in texts}


def _near(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    lines = {name: telling_lines(text) for name, text in texts.items()}
    holders = defaultdict(list)
    for name, own in lines.items():
        for line in own:
            holders[line].append(name)
    known = {name: sum(len(holders[line]) <= COMMON for line in own) for name, own in lines.items()}
    shared = Counter(pair for names in holders.values() if len(names) <= COMMON for pair in combinations(names, 2))
    for (one, other), number in shared.items():
        if number >= LINES and number >= SHARE * min(known[one], known[other]):
            yield one, other


def telling_lines(text: str) -> set[str]:
    """The lines of TELLING characters or more, without the spaces around them."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= TELLING}
