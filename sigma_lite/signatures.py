"""What a class or function takes, read from its source without importing it: `plan` answers before torch is imported."""

from __future__ import annotations

import ast
import importlib.util
import types
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

UNKNOWN = object()  # a type or default that cannot be read: nothing is said about it

REQUIRED = object()


class Parameter(NamedTuple):
    hint: object  # a type such as `int | None`, or UNKNOWN
    default: object  # a plain value, REQUIRED where there is none, or UNKNOWN


class Found(NamedTuple):
    """A definition, and the module in which the names of it mean something."""

    module: str
    node: ast.ClassDef | ast.FunctionDef


class Signature(NamedTuple):
    parameters: dict[str, Parameter]
    open: bool  # it also takes names that its source does not list: **kwargs


def signature(path: str) -> Signature | None:
    """What `package.module.Name` takes; None where no source tells, so that nothing is refused for it."""
    found = _find(path)
    return None if found is None else _of(found)


def parameters(path: str) -> dict[str, Parameter]:
    """The parameters of something whose source is known to be here."""
    found = signature(path)
    assert found is not None, path
    return found.parameters


def names_in(module: str) -> list[str] | None:
    """Every name that a module gives a meaning; None where no source tells."""
    given = [name for node in _statements(module) for name in _names(node)]
    return None if not given or "*" in given else given


def classes_in(module: str) -> list[str]:
    """The classes that a module defines for others, or that it says it exports; [] where no source tells."""
    for node in _statements(module):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return list(ast.literal_eval(node.value))
    names = [node.name for node in _statements(module) if isinstance(node, ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def fits(value: object, hint: object) -> bool:
    """Whether a plain value of yaml has this type. Its lists are tuples, its ints are floats, a bool is neither."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is UNKNOWN:
        return True
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        open_ended = args[-1] is Ellipsis
        return (
            isinstance(value, (list, tuple))
            and (open_ended or len(value) == len(args))
            and all(fits(v, args[0 if open_ended else i]) for i, v in enumerate(value))
        )
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in (types.UnionType, Union):
        return any(fits(value, arg) for arg in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: object) -> str:
    """A type in the words of yaml: "int or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, Union):
        named = [type_name(arg) for arg in sorted(args, key=lambda arg: arg is type(None))]
        return " or ".join(dict.fromkeys(named))
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin in (tuple, list):
        kinds = dict.fromkeys(type_name(arg) for arg in args if arg is not Ellipsis)
        count = "" if origin is list or args[-1] is Ellipsis else f"{len(args)} of "
        return f"a list [...] of {count}{' or '.join(kinds)}"
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) else str(hint)


# ------------------------------------------------------------------------------------------------------------ source


def _file(module: str) -> Path | None:
    """The source of a module. Only its outermost package is looked up, which imports nothing."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    for name in rest:
        if path.name != "__init__.py":
            return None
        inner = (path.parent / name / "__init__.py", path.parent / f"{name}.py")
        path = next((p for p in inner if p.is_file()), None)
        if path is None:
            return None
    return path


@lru_cache(maxsize=256)
def _parsed(path: Path, changed: float) -> tuple[ast.stmt, ...]:
    try:
        return tuple(_flat(ast.parse(path.read_bytes()).body))
    except (SyntaxError, ValueError, OSError):
        return ()


def _statements(module: str) -> tuple[ast.stmt, ...]:
    path = _file(module) if module else None
    return _parsed(path, path.stat().st_mtime) if path else ()


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, also those in `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _flat(node.body)
            yield from _flat(node.orelse)


def _names(node: ast.stmt) -> list[str]:
    """What a statement gives a name."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _find(path: str, depth: int = 0) -> Found | None:
    """The definition behind a dotted path, through re-exports."""
    module, _, name = path.rpartition(".")
    if not module or depth > 8:
        return None
    for node in reversed(_statements(module)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return Found(module, node)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name in _names(node):
            return _find(_meaning(module, name) or "", depth + 1)
    return None


def _meaning(module: str, dotted: str) -> str | None:
    """The full path of a name as a module uses it: `pl.Callback` -> lightning.pytorch.Callback."""
    first, _, rest = dotted.partition(".")
    for node in _statements(module):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) and first in _names(node) else ():
            if first != (alias.asname or alias.name.partition(".")[0]):
                continue
            if isinstance(node, ast.ImportFrom):
                full = ".".join(filter(None, (_origin(module, node), alias.name)))
            else:
                full = alias.name if alias.asname else first
            return f"{full}.{rest}" if rest else full
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == first:
            return f"{module}.{dotted}"
    return None


def _origin(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    path, parts = _file(module), module.split(".")
    up = node.level - (1 if path and path.name == "__init__.py" else 0)
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def _of(found: Found) -> Signature | None:
    """Its own parameters, and where it hands `**kwargs` on or has no `__init__`, those of its bases."""
    if isinstance(found.node, ast.FunctionDef):
        return Signature(_arguments(found.node.args), found.node.args.kwarg is not None)
    if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
        return None
    init = next((n for n in found.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    own, closed = (_arguments(init.args, bound=True), not init.args.kwarg) if init else ({}, False)
    if closed:
        return Signature(own, False)
    for base in map(ast.unparse, found.node.bases):
        above = _find(_meaning(found.module, base.partition("[")[0]) or "")
        inherited = _of(above) if above else None
        if inherited and inherited.parameters:
            free = {n: p for n, p in inherited.parameters.items() if init is None or n not in _settled(init)}
            return Signature(free | own, init is not None or inherited.open)
        if inherited is None and base.partition("[")[0] not in ("object", "ABC", "Generic", "Protocol"):
            return Signature(own, True)
    return Signature(own, init is not None)


def _settled(init: ast.FunctionDef) -> set[str]:
    """What an `__init__` gives its base by name: nobody can give that a second time."""
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__init__"]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


def _arguments(args: ast.arguments, bound: bool = False) -> dict[str, Parameter]:
    placed = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(placed) - len(args.defaults)) + list(args.defaults)
    every = [*zip(placed, defaults, strict=True)][bound:] + [*zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return {arg.arg: Parameter(_type(arg.annotation), _plain(default)) for arg, default in every}


def _plain(node: ast.expr | None) -> object:
    try:
        return REQUIRED if node is None else ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


PLAIN_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "Path": str, "_PATH": str}


def _type(node: ast.expr | None) -> Any:
    """The type that an annotation of plain types means; UNKNOWN where any part of it is something else."""
    if isinstance(node, ast.Constant):
        return _type(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else type(node.value)
    if isinstance(node, ast.Name):
        return PLAIN_TYPES.get(node.id, UNKNOWN)
    if isinstance(node, ast.BinOp):
        parts = [_type(node.left), _type(node.right)]
        return UNKNOWN if UNKNOWN in parts else parts[0] | parts[1]
    if not isinstance(node, ast.Subscript):
        return UNKNOWN
    name = ast.unparse(node.value).rpartition(".")[2].lower()
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "literal":
        return Literal[tuple(ast.literal_eval(part) for part in inner)]
    parts = [... if ast.unparse(part) == "..." else _type(part) for part in inner]
    made = {"optional": Optional, "union": Union, "list": list, "tuple": tuple, "dict": dict}.get(name)
    return UNKNOWN if made is None or UNKNOWN in parts else made[tuple(parts) if len(parts) > 1 else parts[0]]
