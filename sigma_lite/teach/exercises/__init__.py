"""The exercises that check themselves. Each is solved by a function of the package, so the solution cannot go stale."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module

from sigma_lite.config import ConfigError
from sigma_lite.teach.exercises.exercise import Exercise

FILES = sorted(file.name for file in pkgutil.iter_modules(__path__) if file.name.startswith("chapter_"))
CHAPTERS = tuple(import_module(f"{__name__}.{file}") for file in FILES)
ALL: dict[str, Exercise] = {e.name: e for chapter in CHAPTERS for e in chapter.EXERCISES}


def find(name: str) -> Exercise:
    """The exercise of that name. Raises ConfigError that names the nearest one."""
    if name not in ALL:
        near = difflib.get_close_matches(name, ALL, n=1, cutoff=0)
        raise ConfigError(f"exercise {name!r} does not exist; did you mean {near[0]!r}?")
    return ALL[name]
