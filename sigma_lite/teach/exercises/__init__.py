"""The exercises that check themselves. Each is solved by a function of the package, so the solution cannot go stale."""

from __future__ import annotations

import difflib

from sigma_lite.config import ConfigError
from sigma_lite.teach.exercises import (
    chapter_01,
    chapter_02,
    chapter_03,
    chapter_04,
    chapter_05,
    chapter_06,
    chapter_07,
    chapter_08,
    chapter_09,
    chapter_10,
)
from sigma_lite.teach.exercises.exercise import Exercise

CHAPTERS = (
    chapter_01,
    chapter_02,
    chapter_03,
    chapter_04,
    chapter_05,
    chapter_06,
    chapter_07,
    chapter_08,
    chapter_09,
    chapter_10,
)
ALL: dict[str, Exercise] = {e.name: e for chapter in CHAPTERS for e in chapter.EXERCISES}


def find(name: str) -> Exercise:
    """The exercise of that name. Raises ConfigError that names the nearest one."""
    if name not in ALL:
        near = difflib.get_close_matches(name, ALL, n=1, cutoff=0)
        raise ConfigError(f"exercise {name!r} does not exist; did you mean {near[0]!r}?")
    return ALL[name]
