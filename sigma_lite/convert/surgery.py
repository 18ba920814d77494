"""The seam: what an operation on a trained model is, and how a command names one.

    @dataclass(frozen=True)
    class FirstHalf:
        \"\"\"Keep the first half of the experts.\"\"\"

        def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer: ...

    sigma-lite convert RUN OUT --with mine.FirstHalf

Its fields are its settings. A new shape is a new `ModelConfig`, new kinds of layers are new `Parts`: both are recorded, so
they must be such as a yaml can name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from sigma_lite.config import nearest, require
from sigma_lite.data.rows import Batch
from sigma_lite.model import Transformer
from sigma_lite.reading import from_yaml, imported
from sigma_lite.runfile import from_mapping

HOME = "sigma_lite.papers"


class Surgery(Protocol):
    """A frozen dataclass whose fields are plain settings.

    The model that it is given is the caller's: what changes is copied. `rows` are batches of the training text, for
    calibration or a little training; the order is fixed, so the same call gives the same model.
    """

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer: ...


def named(words: Sequence[str]) -> Surgery:
    """A surgery from the words of a command: its name, then settings as key=value.

    The name is a class of sigma_lite.papers ("papers.dense2moe.TaylorSplit" or "dense2moe.TaylorSplit"), or MODULE.CLASS.

    Raises: ConfigError naming the nearest for a name or a setting that does not exist.
    """
    name, *given = words
    cls = _class(name)
    for word in given:
        require("=" in word, f"--with {name} {word}: settings are written key=value")
    pairs = (word.partition("=") for word in given)
    return from_mapping(cls, {key: from_yaml(value, f"{name} {key}") for key, _, value in pairs}, where=name)


def available() -> dict[str, type]:
    """Every surgery of sigma_lite.papers by its short name, "dense2moe.TaylorSplit"."""
    package, found = importlib.import_module(HOME), {}
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{HOME}.{file.name}")
        own = (cls for cls in vars(module).values() if is_surgery(cls) and cls.__module__ == module.__name__)
        found |= {f"{file.name}.{cls.__name__}": cls for cls in own}
    return found


def is_surgery(cls: Any) -> bool:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and "__call__" in dir(cls)):
        return False
    return list(inspect.signature(cls.__call__).parameters) == ["self", "model", "rows"]


def _class(name: str) -> type:
    short = name.removeprefix("sigma_lite.").removeprefix("papers.")
    known = available()
    if short in known:
        return known[short]
    close, first = nearest(short, known), name.partition(".")[0]
    own = "." in name and first not in ("", "sigma_lite", "papers") and find_spec(first) is not None
    require(own, f"--with {name}: no such surgery; {close}, or give MODULE.CLASS of your own")
    cls = imported(name, "--with")
    require(is_surgery(cls), f"--with {name}: a surgery is a dataclass with __call__(self, model, rows); {close}")
    return cls


def settings(surgery: Surgery) -> dict[str, Any]:
    """What a record says of a surgery: its class and its fields."""
    cls = type(surgery)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "settings": dataclasses.asdict(surgery)}  # type: ignore[call-overload]
