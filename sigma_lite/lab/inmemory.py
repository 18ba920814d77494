"""Balancers and parts that exist only in this process, such as those of a notebook: told apart, copied, watched."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from typing import Any

from sigma_lite.config import ConfigError
from sigma_lite.identity import identify

Objects = dict[str, Any]
"""What `lab.worker.train` takes besides a yaml: "own", a balancer, and "parts"."""


def taken_apart(arm: Any) -> tuple[Mapping[str, Any], Objects]:
    """(settings that a yaml can hold, what only this process has) of an arm of `lab.compare`.

    Raises: ConfigError for what is neither settings, balancer nor parts.
    """
    from sigma_lite.balance.balancer import as_balancer  # torch comes with it, and `lab list` does without
    from sigma_lite.model.parts import Parts, as_parts

    if isinstance(arm, Parts):
        return {}, {"parts": arm}
    if not isinstance(arm, Mapping):
        as_balancer(arm)
        return {}, {"own": arm}
    model = dict(arm["model"]) if isinstance(arm.get("model"), Mapping) else {}
    found: Objects = {}
    if not _plain(model.get("custom_balance")):
        found["own"] = model.pop("custom_balance")
        as_balancer(found["own"])
    if not _plain(model.get("parts")):
        found["parts"] = as_parts(model.pop("parts"))
    return ({**arm, "model": model} if found else arm), found


def identities(objects: Objects) -> dict[str, dict[str, Any]]:
    """As a run records them."""
    own = {"custom_balance": objects["own"]} if "own" in objects else {}
    parts = objects["parts"].custom if "parts" in objects else {}
    return {name: identify(one) for name, one in {**own, **{f"parts.{n}": part for n, part in parts.items()}}.items()}


def as_text(known: Mapping[str, Any]) -> str:
    """What decides that an arm is another one; of a balancer alone, what it has always been."""
    if not known:
        return ""
    return json.dumps(known["custom_balance"] if known.keys() == {"custom_balance"} else known, sort_keys=True)


def copied(objects: Objects, arm: str, last: bool) -> Objects:
    """Objects in the state that they have now. Raises ConfigError for one that cannot be copied, unless it is used last."""
    try:
        return copy.deepcopy(objects)
    except Exception as error:  # what an object says that cannot be copied
        if last:
            return objects
        raise ConfigError(
            f"{_names(objects)} of arm {arm!r} cannot be copied ({error}), so its second seed would begin with what the"
            " first one left in it: give one seed, or leave out what cannot be copied"
        ) from error


def warn_if_written_to(objects: Objects, before: dict[str, Any], arm: str) -> None:
    """A function has no copy: where it writes into what it reads, the next seed is another one."""
    now = identities(objects)
    if now != before and not any("unknown" in one for one in now.values()):
        warnings.warn(
            f"{_names(objects)} of arm {arm!r} changed a value outside of it while it trained, so another seed begins with"
            " what this one left: keep the value in a Balancer object, which each run gets a copy of",
            stacklevel=3,
        )


def _names(objects: Objects) -> str:
    return " and ".join({"own": "the balancer", "parts": "the parts"}[name] for name in objects)


def _plain(value: Any) -> bool:
    """Whether a yaml can hold it."""
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (type(None), bool, int, float, str))
