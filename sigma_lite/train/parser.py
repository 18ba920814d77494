"""What LightningCLI's parser says and offers, cut down to what a run of ours can use."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from sigma_lite.config import ConfigError
from sigma_lite.lightning_keys import FIXED


class StrictParser(LightningArgumentParser):
    """One sentence for what it cannot read, not a page of options; and no option by the first letters of its name.

    Keys that cannot be chosen are no options, so that --print_config prints what `fit` accepts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"exit_on_error": False, "allow_abbrev": False})

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> Any:
        skip = set(FIXED) if theclass is pl.Trainer else set()
        return super().add_class_arguments(theclass, *args, **kwargs | {"skip": skip | set(kwargs.get("skip") or ())})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(f"{one_sentence(message)}; `sigma-lite fit --help` lists what can be set") from ex


def one_sentence(message: str) -> str:
    """jsonargparse lists all that it tried; the key, the value and, where there is one, the type are enough."""
    said = re.search(
        r"(Problem with given class_path .*?|Problem instantiating .*?)(?=\n\s*- |\n\s*Given value|$)", message, re.S
    )
    if "balancer.Balancer" in message:  # the first complaint is about the class that was named; the others are noise
        first = re.split(r"\n\s*- ", message.partition("Errors:")[2])[1]
        return f"model.custom_balance: {' '.join(first.split()).partition('; `sigma-lite')[0]}"
    if said:
        return " ".join(said[1].split())
    key, value = re.search(r'key "(.+?)"', message), re.search(r"(?:Got|Given) value: (.*)", message)
    kinds = [kind for kind in re.findall(r"Expected a <class '(\w+)'>", message) if kind != "NoneType"]
    if not key or not value:
        return " ".join(message.split())
    nested = re.match(r"NestedArg\(key='(.+?)', val=(.*)\)", value[1])
    if nested:
        return f"{key[1]}.{nested[1]}={nested[2]}: its class takes no {nested[1]}"
    return f"{key[1]}={value[1]}: " + (f"expected {kinds[0]}" if len(kinds) == 1 else "not a value that it can have")
