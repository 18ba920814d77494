"""Yaml files and command-line overrides into checked settings: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigma_lite.config import (
    OF_ALL_SOURCES,
    OF_ONE_SOURCE,
    BalanceConfig,
    ConfigError,
    CorpusConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RowsConfig,
    SparsityConfig,
    StartConfig,
    check_mixture,
    check_reward,
    check_schedule,
    check_threads,
    nearest,
    plain_path,
    require,
)
from sigma_lite.lightning_keys import TAKERS, check_end, check_lightning_keys, group, require_type
from sigma_lite.reading import from_yaml, overlay, read_yaml

SECTIONS: dict[str, dict[str, type]] = {
    "model": {
        **{"net": ModelConfig, "sparsity": SparsityConfig, "balance": BalanceConfig, "optim": OptimConfig},
        "reward": RewardConfig,
    },
    "data": {"corpus": CorpusConfig, "rows": RowsConfig, "mixture": MixtureConfig},
}
PLAIN = {"model": {"custom_balance", "parts"}, "data": {"num_workers"}}  # keys without a class, which LightningCLI checks

GROUPS = {*SECTIONS, *TAKERS}
STARTS = tuple(f.name for f in dataclasses.fields(StartConfig))  # what a run begins from: keys outside of all groups too
FLAGS = {"extend"}  # that a command line gives without a value
ALONE = {"seed_everything", "ckpt_path", "verbose", "threads", *STARTS}  # what `validate --print_config` says too


@dataclass(frozen=True)
class RunConfig:
    """A whole yaml file (or several, laid over each other) as checked settings."""

    net: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    trainer: Mapping[str, object] = field(default_factory=dict)  # Lightning's own keys, checked by lightning_keys.py
    save: Mapping[str, object] = field(default_factory=dict)  # when checkpoints are written: train/callbacks/save.py
    start: StartConfig = field(default_factory=StartConfig)
    threads: int | str | None = None  # of a CPU that trains: a number, auto, or what OMP_NUM_THREADS and torch say
    custom_balance: object = None  # a balancer of the reader's own, which only training builds
    parts: object = None  # parts of the reader's own, likewise

    def __post_init__(self) -> None:
        check_schedule(self.net, self.sparsity, self.trainer.get("max_steps"))
        check_mixture(self.corpus, self.rows, self.mixture)
        sources = source_corpora(self.corpus, self.mixture) or {"": self.corpus}
        own = self.custom_balance is not None
        check_reward(self.reward, self.balance, sources, self.rows, self.mixture.weights, own)
        check_threads(self.threads)


def load_run(paths: Sequence[str | Path], over: Mapping[str, object] | None = None, fit: bool = False) -> RunConfig:
    """Read yaml files, later ones over earlier ones, and check every key: the one reader of every command.

    Args:
        over: groups of keys laid over the files: see `overrides`.
        fit: also what only training cannot have.

    Raises ConfigError for a file that cannot be read, an unknown key (naming the nearest) or a value that breaks a rule.
    """
    return checked(overlay(read_files(paths), over or {}), fit)


def read_files(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The keys of several files, later ones over earlier ones."""
    merged: dict[str, Any] = {}
    for path in paths:
        content = read_yaml(path)
        for section in content.keys() & GROUPS:
            group(content[section], f"{path}: {section}")
        merged = overlay(merged, content)
    return merged


def checked(merged: Mapping[str, Any], fit: bool = False) -> RunConfig:
    """Plain values as settings; ConfigError for what no run can have."""
    known = {*GROUPS, *ALONE}
    for key in merged:
        require(key in known, f"unknown key {key!r}; {nearest(key, known)}")
    parts: dict[str, Any] = {name: group(merged.get(name, {}), name) for name in ("trainer", "save")}
    if (root := parts["trainer"].get("default_root_dir")) is not None:
        plain_path(str(root), "trainer.default_root_dir")
    for section, classes in SECTIONS.items():
        given = group(merged.get(section, {}), section)
        for name in given:
            choices = {*classes, *PLAIN[section]}
            require(name in choices, f"unknown key {section}.{name}; {nearest(name, choices)}")
        for name, cls in classes.items():
            parts[name] = from_mapping(cls, given.get(name, {}), where=f"{section}.{name}")
    for name in ("custom_balance", "parts"):
        parts[name] = merged.get("model", {}).get(name)
    parts["threads"] = merged.get("threads")
    check_lightning_keys(merged)
    parts["start"] = from_mapping(StartConfig, {name: merged[name] for name in STARTS if name in merged}, where="")
    if fit:
        check_end(merged)
    linked = "vocab_size" not in merged.get("data", {}).get("corpus", {})
    require(linked, "data.corpus.vocab_size is always the model's: leave it out and set model.net.vocab_size")
    parts["corpus"] = dataclasses.replace(parts["corpus"], vocab_size=parts["net"].vocab_size)
    return RunConfig(**parts)


def split_files(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that a command line names with -c or --config, in order, and all its other arguments."""
    files, rest, pending = [], [], False
    for arg in args:
        name, equals, value = arg.partition("=")
        if pending:
            files.append(arg)
        elif equals and name in ("-c", "--config"):
            files.append(value)
        elif arg.startswith("-c") and arg != "-c":
            files.append(arg[2:])
        elif arg not in ("-c", "--config"):
            rest.append(arg)
        pending = not pending and arg in ("-c", "--config")
    require(not pending, "-c needs a value: write -c FILE")
    return files, rest


def overrides(args: Sequence[str]) -> dict[str, Any]:
    """The `--section.key value` and `--section.key=value` of a command line, as groups of keys; values are yaml.

    `--section` alone takes a file or a group, `--section.key+=value` adds to a list. The last of two values counts.
    """
    groups: dict[str, Any] = {}
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if not name.startswith("--") or not ("." in name or name[2:] in GROUPS | ALONE):
            continue
        flag = name[2:] in FLAGS and not equals
        require(flag or bool(equals) or place + 1 < len(args), f"{name} needs a value: write {name}=VALUE")
        *path, key = name[2:].removesuffix("+").split(".")
        given = True if flag else from_yaml(value if equals else args[place + 1], name)
        if not path and key in GROUPS and isinstance(given, str):
            given = read_yaml(given)
        branch = {key: [given] if name.endswith("+") else given}
        for part in reversed(path):
            branch = {part: branch}
        groups = _laid_over(groups, branch)
    return groups


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As `overlay`; but the options of a class follow its name: --trainer.logger=CSVLogger --trainer.logger.save_dir=x."""
    result = overlay(base, over)
    for key in base.keys() & over.keys():
        one, other = base[key], over[key]
        if isinstance(one, list) and isinstance(other, list):
            result[key] = one + other
        elif isinstance(one, list) and one and isinstance(other, dict):
            result[key] = [*one[:-1], _laid_over({key: one[-1]}, {key: other})[key]]
        elif isinstance(one, str) and isinstance(other, dict):
            result[key] = {"class_path": one, **other}
        elif isinstance(one, dict) and isinstance(other, dict) and "class_path" not in other:
            result[key] = _laid_over(one, other)
    return result


def from_mapping(cls: type, given: Mapping[str, object], where: str):
    """Build a config dataclass from plain values, refusing unknown keys and wrong types by name."""
    hints = typing.get_type_hints(cls)
    for key, value in group(given, where).items():
        full = f"{where}.{key}".removeprefix(".")
        require(key in hints, f"unknown key {full}; {nearest(key, hints)}")
        require_type(value, hints[key], full)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def source_corpora(corpus: CorpusConfig, mixture: MixtureConfig) -> dict[str, CorpusConfig]:
    """The settings of each source of a mixture, as if it were a corpus by itself; {} without a mixture.

    Raises: ConfigError for an unknown key, naming the nearest, and for one that all sources must share.
    """
    shared = {f.name: getattr(corpus, f.name) for f in dataclasses.fields(corpus) if f.name not in OF_ONE_SOURCE}
    if mixture.sources and corpus.tokenizer:  # which is finished
        shared |= {"special_tokens": (), "single_digits": False}
    found = {}
    for name, given in mixture.sources.items():
        where = f"data.mixture.sources.{name}"
        for key in group(given, where).keys() & {*OF_ALL_SOURCES}:
            require(False, f"{where}.{key}: all sources share one tokenizer; set data.corpus.{key}")
        require("source" in given, f"{where} needs source: programs, stdlib, domains, packages, files, hf, tasks or chat")
        own = {"dir": os.path.join(corpus.dir, name), **given}
        try:
            from_mapping(CorpusConfig, {"heldout": corpus.heldout} | own, where)  # names and types, as they were given
            found[name] = from_mapping(CorpusConfig, shared | own, where)
        except ConfigError as error:
            raise error if where in str(error) else ConfigError(f"{where}: {error}") from None
    folders = [found[name].dir for name in found]
    twice = [folder for folder in {*folders} if folders.count(folder) > 1]
    require(not twice, f"data.mixture.sources: two are kept in {', '.join(twice)}; give each its own dir")
    return found
