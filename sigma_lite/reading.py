"""What people write, read: a yaml file into plain values, and MODULE.NAME into the class or function that it names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sigma_lite.config import ConfigError, nearest, plain_path, require


class _Yaml(yaml.SafeLoader):
    """Plain yaml reads `1e-3` as text; a learning rate is a number. And no setting is a date: `2024-01-01` is a name."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of one file. Raises ConfigError for a file that is missing, no UTF-8 text, no yaml, or empty."""
    path = Path(plain_path(path, "config file"))
    require(not path.is_dir(), f"config file {path} is a folder: give one of the yaml files in it, such as {_example(path)}")
    require(path.exists(), f"config file {path} does not exist in {Path.cwd()}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}; change who may read it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start}): give a yaml file, saved as UTF-8"
        ) from error
    content = from_yaml(text, str(path))
    require(content is not None, f"config file {path} is empty: write settings into it, or leave it out")
    require(isinstance(content, dict), f"{path} must hold keys, found {type(content).__name__}: write `section:` lines")
    return content


def _example(folder: Path) -> str:
    return next((str(path) for path in sorted(folder.glob("*.y*ml"))), "FOLDER/FILE.yaml")


def from_yaml(text: str, where: str) -> Any:
    """The plain value of a yaml text; ConfigError names `where` it stands, and a key that is given twice."""
    try:
        loader = _Yaml(text)  # a SafeLoader: builds no objects
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_each_key_once(loader, node, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not valid yaml: {' '.join(str(error).split())}") from error


def _require_each_key_once(loader: _Yaml, node: yaml.Node, where: str, path: str = "", above: tuple = ()) -> None:
    """Plain yaml keeps the last of two equal keys, and drops what the first one held without a word.

    The nodes are looked at before `<<` merges anything: a key that stands beside `<<` may change what is merged.
    """
    require(node not in above, f"{where}, line {node.start_mark.line + 1}: {path or 'it'} contains itself; write it out")
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _require_each_key_once(loader, item, where, f"{path}[{number}]", (*above, node))
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        merge = key_node.tag == "tag:yaml.org,2002:merge"
        plain = isinstance(key_node, yaml.ScalarNode) and not merge
        key = loader.construct_object(key_node, deep=True) if plain else key_node
        name = f"{path}.{key_node.value}" if path else str(key_node.value)
        require(
            merge or key not in first,
            f"{where} gives {name} twice, in line {first.get(key)} and in line {line}, and only the second would count:"
            " make them one",
        )
        first[key] = line
        _require_each_key_once(loader, value, where, name, (*above, node))


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of keys, those of `over` laid over those of `base`; another class begins without the first one's arguments."""

    def both(key: str) -> bool:
        one, other = base[key], over[key]
        groups = isinstance(one, Mapping) and isinstance(other, Mapping)
        return groups and ("class_path" not in other or one.get("class_path") in (None, other["class_path"]))

    return {**base, **over, **{key: overlay(base[key], over[key]) for key in base.keys() & over.keys() if both(key)}}


def imported(path: str, where: str) -> Any:
    """The class or function that MODULE.NAME names, for the setting `where`.

    Raises: ConfigError for a path without a module, for a module that cannot be imported, whatever it raises, for a name
        that it does not have (naming the nearest), and for what cannot be called.
    """
    module, _, name = path.rpartition(".")
    require(bool(module), f"{where}={path!r}: give the whole path, MODULE.NAME")
    try:
        home = importlib.import_module(module)
        found = getattr(home, name, None)
    except (Exception, SystemExit) as error:  # a reader's own file may raise anything, such as a SyntaxError
        raise ConfigError(f"{where}={path} cannot be imported: {type(error).__name__}: {error}") from error
    names = [known for known, value in vars(home).items() if callable(value) and not known.startswith("_")]
    require(found is not None, f"{where}={path}: {module} has no {name}; {nearest(name, names)}")
    require(callable(found), f"{where}={path} cannot be called: it is of type {type(found).__name__}")
    return found
