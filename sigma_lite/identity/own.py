"""A reader's balancer as a run records it: class, settings and a fingerprint of the code; and whether two are the same."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

from sigma_lite.identity.fingerprint import PYTHON, Fingerprints


def identify(own: Any) -> dict[str, Any]:
    """A reader's object as plain values: class (or the function's name), settings, code; and what has no fingerprint.

    `settings` are for people: what is plain in the object's state, or in a partial's arguments. `code` is the fingerprint
    of code and state together. `unknown` names values that cannot be told from others of their type, such as an open file;
    left out when there are none.
    """
    prints = Fingerprints(name_of(own).rpartition(".")[0])
    code = f"{PYTHON}:{prints.of(own, 'it')[:16]}"
    known = {"class": name_of(own), "settings": settings_of(own), "code": code}
    return known | ({"unknown": sorted(set(prints.unknown))} if prints.unknown else {})


def identify_named(path: str) -> str:
    """Fingerprint of the class or function that a yaml names, such as "ideas.Mine". Raises ImportError, AttributeError."""
    module, _, name = path.rpartition(".")
    own = getattr(importlib.import_module(module), name)
    return f"{PYTHON}:{Fingerprints(own.__module__).of(own, path)[:16]}"


def name_of(own: Any) -> str:
    """Where it is defined and what it is called: "ideas.Mine"; a partial has the name of its function."""
    if isinstance(own, functools.partial):
        return name_of(own.func)
    if not (hasattr(own, "__qualname__") and hasattr(own, "__module__")):
        own = type(own)
    return f"{own.__module__}.{own.__qualname__}"


def settings_of(own: Any, depth: int = 3) -> dict[str, Any]:
    """What an object holds, by name, or a partial's arguments: plain values as they are, of others what they are."""
    if isinstance(own, functools.partial):
        state = {**{str(place): value for place, value in enumerate(own.args)}, **own.keywords}
    else:
        state = {} if isinstance(own, (type, types.FunctionType, types.MethodType)) else getattr(own, "__dict__", {})
    return {name: _shown(value, depth) for name, value in state.items()}


def _shown(value: Any, depth: int) -> Any:
    if isinstance(value, (type(None), bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and depth:
        return [_shown(item, depth - 1) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} {list(value.shape)} {Fingerprints(None).of(value, '')[:8]}"
    if callable(value) or not isinstance(getattr(value, "__dict__", None), dict) or not depth:
        return name_of(value)
    return {"class": name_of(value), "settings": settings_of(value, depth - 1)}


# ---------------------------------------------------------------------------------------------------------- comparing


def own_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The identities that a run's recorded settings hold: of the balancer and each part of the reader's own, and so on."""
    return {name: value for name, value in settings.items() if name.startswith(("custom_", "parts."))}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`difference` of the first of the reader's objects in which two runs' settings differ; "" for none."""
    one, other = own_in(then), own_in(now)
    found = (difference(one.get(name), other.get(name), name) for name in sorted(one.keys() | other.keys()))
    return next(filter(None, found), "")


def doubts(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`doubt` of each of the reader's objects."""
    one, other = own_in(then), own_in(now)
    return [why for name in sorted(one.keys() & other.keys()) if (why := doubt(one[name], other[name]))]


def difference(then: dict | str | None, now: dict | str | None, what: str = "custom_balance") -> str:
    """In what two recorded identities differ, as the end of a sentence; "" where they mean the same.

    Runs older than fingerprints recorded text, such as "ideas.Mine(strength=0.1)", and nothing of the code. Fingerprints of
    two versions of Python say nothing about each other. Neither counts as a difference: `doubt` says that it is one.
    """
    if then == now:
        return ""
    if not isinstance(then, dict) or not isinstance(now, dict):
        older, newer = (then, now) if isinstance(now, dict) else (now, then)
        if isinstance(older, str) and isinstance(newer, dict) and older in _as_older_runs_wrote(newer):
            return ""
        return f"{what}={in_words(then)} then, {in_words(now)} now"
    if then["class"] != now["class"]:
        return f"{what}={then['class']} then, {now['class']} now"
    for name in sorted(then["settings"].keys() | now["settings"].keys()):
        one, other = (side["settings"].get(name) for side in (then, now))
        if one != other:
            return f"{what}={in_words(then)} then, {in_words(now)} now"
    if _python(then) == _python(now) and then["code"] != now["code"]:
        return f"{what}={in_words(now)}, whose code has changed since: its functions, or a value that they read"
    return ""


def doubt(then: dict | str | None, now: dict | str | None) -> str:
    """Why nobody can tell whether two identities without a `difference` are the same, as a sentence; "" if one can."""
    if then is None or now is None:
        return ""
    if isinstance(then, str) or isinstance(now, str):
        return f"the code of {in_words(now)} was not recorded when the run began: it is taken to be the same"
    if _python(then) != _python(now):
        return (
            f"the code of {in_words(now)} was recorded under {_python(then)}, this is {_python(now)}: taken to be the same"
        )
    unknown = now.get("unknown", [])
    return (
        f"{in_words(now)} holds what has no fingerprint ({', '.join(unknown)}): it is taken to be the same"
        if unknown
        else ""
    )


def in_words(identity: dict | str | None) -> str:
    """ "ideas.Mine(strength=0.1)"."""
    if not isinstance(identity, dict):
        return str(identity)
    settings = ", ".join(f"{k}={in_words(v) if isinstance(v, dict) else repr(v)}" for k, v in identity["settings"].items())
    return f"{identity['class']}({settings})" if settings else identity["class"]


def _python(identity: dict) -> str:
    return identity["code"].partition(":")[0]


def _as_older_runs_wrote(identity: dict) -> set[str]:
    """The texts that name such an object without its code: with all settings, or without the last ones, at their default."""
    shown, defaults = (
        [f"{k}={_older(v)}" for k, v in identity["settings"].items() if _older(v)],
        _defaults(identity["class"]),
    )
    kept = len(shown)
    while kept and shown[kept - 1] in defaults:
        kept -= 1
    return ({identity["class"]} if not shown else set()) | {
        f"{identity['class']}({', '.join(shown[:n])})" for n in range(kept, len(shown) + 1)
    }


def _older(value: Any) -> str:
    if isinstance(value, dict):
        inner = [f"{k}={_older(v)}" for k, v in value["settings"].items() if _older(v)]
        return f"{value['class'].rpartition('.')[2]}({', '.join(inner)})"
    return repr(value) if isinstance(value, (int, float, str)) else ""


def _defaults(path: str) -> set[str]:
    """{"strength=0.1", ...} of a class that this process has imported already: a record must not name code that is run."""
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    parameters = inspect.signature(cls).parameters.values() if isinstance(cls, type) else ()
    return {f"{p.name}={p.default!r}" for p in parameters if isinstance(p.default, (int, float, str))}
