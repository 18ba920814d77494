"""Yaml files and command-line overrides into checked settings: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from sigma_lite.config import (
    BalanceConfig,
    ConfigError,
    CorpusConfig,
    ModelConfig,
    OptimConfig,
    RowsConfig,
    SparsityConfig,
    check_schedule,
    nearest,
    plain_path,
    require,
)

SECTIONS: dict[str, dict[str, type]] = {
    "model": {"net": ModelConfig, "sparsity": SparsityConfig, "balance": BalanceConfig, "optim": OptimConfig},
    "data": {"corpus": CorpusConfig, "rows": RowsConfig},
}
PLAIN = {"model": {"custom_balance"}, "data": {"num_workers"}}  # keys without a class, which LightningCLI checks


@dataclass(frozen=True)
class RunConfig:
    """A whole yaml file (or several, laid over each other) as checked settings."""

    net: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    trainer: Mapping[str, object] = field(default_factory=dict)  # Lightning's own keys, checked by train/rules.py
    save: Mapping[str, object] = field(default_factory=dict)  # when checkpoints are written: train/callbacks/save.py
    custom_balance: object = None  # a balancer of the reader's own, which only training builds

    def __post_init__(self) -> None:
        require(isinstance(self.trainer, Mapping), f"trainer must be a group of keys, not {self.trainer!r}")
        check_schedule(self.net, self.sparsity, self.trainer.get("max_steps"))


def load_run(paths: Sequence[str | Path], over: Mapping[str, object] | None = None) -> RunConfig:
    """Read yaml files, later ones over earlier ones, and check every key.

    Args:
        over: groups of keys laid over the files: see `overrides`.

    Raises ConfigError for a missing file, an unknown key (naming the nearest) or a value that breaks a rule.
    """
    merged: dict = {}
    for path in paths:
        merged = overlay(merged, read_yaml(path))
    merged = overlay(merged, dict(over or {}))
    known = {*SECTIONS, "trainer", "save", "spike_guard", "seed_everything", "ckpt_path"}
    parts: dict[str, object] = {name: merged.get(name) or {} for name in ("trainer", "save")}
    for key in merged:
        require(key in known, f"unknown key {key!r}; {nearest(key, known)}")
    if isinstance(parts["trainer"], Mapping) and (root := parts["trainer"].get("default_root_dir")) is not None:
        plain_path(str(root), "trainer.default_root_dir")
    for section, classes in SECTIONS.items():
        given = merged.get(section) or {}
        require(isinstance(given, Mapping), f"{section} must be a group of keys, not {given!r}")
        for name in given:
            choices = {*classes, *PLAIN[section]}
            require(name in choices, f"unknown key {section}.{name}; {nearest(name, choices)}")
        for name, cls in classes.items():
            parts[name] = from_mapping(cls, given.get(name) or {}, where=f"{section}.{name}")
    parts["custom_balance"] = (merged.get("model") or {}).get("custom_balance")
    linked = "vocab_size" not in ((merged.get("data") or {}).get("corpus") or {})
    require(linked, "data.corpus.vocab_size is always the model's: leave it out and set model.net.vocab_size")
    parts["corpus"] = dataclasses.replace(parts["corpus"], vocab_size=parts["net"].vocab_size)
    return RunConfig(**parts)


def overrides(args: Sequence[str]) -> dict:
    """The `--section.key value` and `--section.key=value` of a command line, as groups of keys; values are yaml."""
    groups: dict = {}
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if not name.startswith("--") or "." not in name or name.endswith("+"):
            continue
        require(bool(equals) or place + 1 < len(args), f"{name} needs a value: write {name}=VALUE")
        *path, key = name[2:].split(".")
        branch: dict = {key: _from_yaml(value if equals else args[place + 1], name)}
        for part in reversed(path):
            branch = {part: branch}
        groups = overlay(groups, branch)
    return groups


def from_mapping(cls: type, given: Mapping[str, object], where: str):
    """Build a config dataclass from plain values, refusing unknown keys and wrong types by name."""
    require(isinstance(given, Mapping), f"{where} must be a group of keys, not {given!r}")
    hints = typing.get_type_hints(cls)
    for key, value in given.items():
        require(key in hints, f"unknown key {where}.{key}; {nearest(key, hints)}")
        require(value_fits(value, hints[key]), f"{where}.{key}={value!r}: expected {type_name(hints[key])}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def value_fits(value: object, hint: object) -> bool:
    """Whether a value from yaml is of a type made of int, float, bool, str, tuples of these and alternatives."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        open_ended = args[-1] is Ellipsis
        return (
            isinstance(value, (list, tuple))
            and (open_ended or len(value) == len(args))
            and all(value_fits(v, args[0 if open_ended else i]) for i, v in enumerate(value))
        )
    if origin in (types.UnionType, typing.Union):
        return any(value_fits(value, arg) for arg in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


class _Yaml(yaml.SafeLoader):
    """Plain yaml reads `1e-3` as text; a learning rate is a number."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict:
    """The keys of one file. Raises ConfigError for a missing file or one that is not yaml."""
    path = Path(plain_path(path, "config file"))
    require(path.is_file(), f"config file {path} does not exist: looked from {Path.cwd()}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file ({error.reason} at byte {error.start}): give a yaml file") from error
    content = _from_yaml(text, str(path))
    require(content is None or isinstance(content, dict), f"{path} must hold keys, found {type(content).__name__}")
    return content or {}


def _from_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Yaml)  # a SafeLoader: builds no objects
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid yaml: {' '.join(str(error).split())}") from error


def overlay(base: dict, over: dict) -> dict:
    both_groups = {k for k in base.keys() & over.keys() if isinstance(base[k], dict) and isinstance(over[k], dict)}
    return {**base, **over, **{k: overlay(base[k], over[k]) for k in both_groups}}
