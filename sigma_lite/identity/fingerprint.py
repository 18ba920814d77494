"""Fingerprints of values by what Python will execute: equal for what does the same, whichever process asks.

A fingerprint follows the compiled functions of an object's class and of its parents, the values that they close over, the
helpers that they name in the same file, notebook or package, and the object's own state. Comments and docstrings do not
count. Compiled code is what is in memory, where the source file may be newer; but it is another for each Python version.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PYTHON = f"py{sys.version_info.major}.{sys.version_info.minor}"
PACKAGE = __name__.split(".")[0]
HAS_DOCSTRING = 0x4000000  # a flag of compiled functions from Python 3.14 on
PLAIN = (type(None), bool, int, float, complex, str, bytes)


class Fingerprints:
    """Digests of values, by content: equal for what executes alike, whichever process asks."""

    def __init__(self, home: str | None):
        self.home = home or ""  # the module of the object that is asked about: entered wherever it is installed
        self.unknown: list[str] = []
        self._open: list[int] = []  # values that are being looked at: a circle ends there
        self._done: dict[int, tuple[str, Any]] = {}  # keeps what it has seen, so that no number is given out twice

    def of(self, value: Any, where: str) -> str:
        """Digest of a value; `where` is how a person would name it."""
        if isinstance(value, PLAIN):
            return digest_of(type(value).__name__, repr(value))
        if id(value) in self._done:
            return self._done[id(value)][0]
        if id(value) in self._open:
            return digest_of("circle", str(len(self._open) - self._open.index(id(value))))
        self._open.append(id(value))
        try:
            found = digest_of(*self._parts(value, where))
        finally:
            self._open.pop()
        self._done[id(value)] = found, value
        return found

    def _parts(self, value: Any, where: str) -> Iterator[str]:
        tensor = getattr(sys.modules.get("torch"), "Tensor", ())
        yield type(value).__name__
        if type(value) in (list, tuple):
            yield from (self.of(item, f"{where}[{i}]") for i, item in enumerate(value))
        elif type(value) in (set, frozenset):
            yield from sorted(self.of(item, where) for item in value)
        elif type(value) in (dict, types.MappingProxyType):
            yield from sorted(self.of(k, where) + self.of(v, f"{where}[{k!r}]") for k, v in value.items())
        elif isinstance(value, tensor):
            yield from (str(value.dtype), str(tuple(value.shape)), hashlib.sha256(_bytes_of(value)).hexdigest())
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from (self.of(value.__func__, where), self.of(value.__self__, where))
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, property):
            yield from (self.of(part, where) for part in (value.fget, value.fset, value.fdel))
        elif isinstance(value, (staticmethod, classmethod)):
            yield self.of(value.__func__, where)
        elif isinstance(value, functools.partial):
            yield from (self.of(part, where) for part in (value.func, value.args, value.keywords))
        elif isinstance(value, types.CodeType):
            yield from self._code(value)
        elif hasattr(value, "__wrapped__") and callable(value):  # functools.cache, functools.wraps in C
            yield self.of(value.__wrapped__, where)
        else:
            yield from self._object(value, where)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        if not self._enters(function.__globals__.get("__name__")):  # a wrapper borrows the module's name of what it wraps
            yield f"{function.__module__}.{function.__qualname__}"
            yield self.of(getattr(function, "__wrapped__", None), function.__qualname__)
            return
        name = function.__qualname__
        yield self.of(function.__code__, name)
        yield self.of((function.__defaults__, function.__kwdefaults__), f"a default of {name}")
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell: a name that is not bound yet
                yield free + self.of(cell.cell_contents, f"{free} of {name}")
        for used, value in _read_by(function.__code__, function.__globals__, self._enters):
            yield used + self.of(value, used)

    def _code(self, code: types.CodeType) -> Iterator[str]:
        yield from (code.co_code.hex(), str(code.co_flags & ~HAS_DOCSTRING), getattr(code, "co_exceptiontable", b"").hex())
        yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount))
        yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        for place, constant in enumerate(code.co_consts):
            yield "" if place == 0 and _is_docstring(code) else self.of(constant, "a constant")

    def _class(self, cls: type) -> Iterator[str]:
        for base in cls.__mro__:
            yield f"{base.__module__}.{base.__qualname__}" if not self._enters(base.__module__) else base.__qualname__
            if self._enters(base.__module__):
                yield from (name + self.of(value, f"{base.__qualname__}.{name}") for name, value in _own_attributes(base))

    def _object(self, value: Any, where: str) -> Iterator[str]:
        """As pickle takes an object apart: what makes it, and its state."""
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            yield str(getattr(value, "__module__", "")) + value.__qualname__
            return
        if hasattr(value, "get_state") and type(value).__name__ == "Generator":  # torch's, which cannot be pickled
            yield self.of(value.get_state(), where)
            return
        yield self.of(type(value), where)
        try:
            made = value.__reduce_ex__(2)
        except Exception:  # whatever an object says that cannot be copied: a lock, a file, a socket, a generator
            self.unknown.append(f"{where} ({type(value).__qualname__})")
            return
        if isinstance(made, str):
            yield made
            return
        make, arguments, state, items, pairs = (*made, None, None, None)[:5]
        yield self.of(None if make is copyreg.__newobj__ else make, where)  # type: ignore[attr-defined]
        yield self.of([a for a in arguments if a is not type(value)], where)
        yield from _of_state(self, state, where)
        yield self.of([list(items or ()), dict(pairs or ())], where)

    def _enters(self, module: object) -> bool:
        """Whether a module's code is looked into: the reader's, and the object's own file; of the rest the name will do."""
        if not isinstance(module, str | None):
            return False  # a class of Cython's, whose __module__ is a field of its objects
        module = module or ""
        package = module.split(".")[0]
        if package == PACKAGE:  # `package_code` covers the others
            return module == self.home or module.startswith(f"{package}.papers.")
        return package == self.home.split(".")[0] or not _installed(module)


def _of_state(prints: Fingerprints, state: Any, where: str) -> Iterator[str]:
    if isinstance(state, dict):
        yield from (
            f"{name}" + prints.of(value, f"{where}.{name}")
            for name, value in sorted(state.items(), key=lambda item: str(item[0]))
        )
    else:
        yield prints.of(state, where)


def _own_attributes(cls: type) -> Iterator[tuple[str, Any]]:
    """What the class says itself, without what Python keeps there and what a dataclass writes for it."""
    slots, methods = (
        (types.GetSetDescriptorType, types.MemberDescriptorType),
        (types.FunctionType, staticmethod, classmethod),
    )
    for name, value in sorted(vars(cls).items()):
        special = name.startswith("__") and name.endswith("__") or name == "_abc_impl"
        kept_by_python = special and (not isinstance(value, (*methods, property)) or name.startswith("__annotat"))
        file = getattr(getattr(value, "__code__", None), "co_filename", "")
        written = file == "<string>" and hasattr(cls, "__dataclass_fields__")
        describes = name in ("assumes", "must_fit")  # a label of the family table, a refusal: no step depends on them
        if not (kept_by_python or written or describes or isinstance(value, slots)):
            yield name, value


def _read_by(code: types.CodeType, namespace: Mapping[str, Any], enters: Callable) -> Iterator[tuple[str, Any]]:
    """(name, value) of what code reads: from its module, and from the reader's own modules that it names."""
    whole = [code, *_inside(code)]
    attributes = sorted(set().union(*(part.co_names for part in whole)))
    for name in sorted(set().union(*map(_globals_named, whole)) & namespace.keys()):  # others are Python's own
        yield name, namespace[name]
        yield from _parts_of_module(name, namespace[name], attributes, enters)


def _parts_of_module(where: str, module: Any, names: list[str], enters: Callable) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, types.ModuleType) or not enters(module.__name__):
        return
    for name in names:
        if name in vars(module):
            yield f"{where}.{name}", vars(module)[name]
            yield from _parts_of_module(f"{where}.{name}", vars(module)[name], [n for n in names if n != name], enters)


def _inside(code: types.CodeType) -> list[types.CodeType]:
    """Functions, lambdas and comprehensions that are written inside of it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return inner + [deeper for each in inner for deeper in _inside(each)]


def _globals_named(code: types.CodeType) -> set[str]:
    """Names that it looks up in its module; `x.loss` does not read a variable called loss."""
    return {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _is_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is one, or the None that stands there without one."""
    if sys.version_info >= (3, 14):
        return bool(code.co_flags & HAS_DOCSTRING)
    return bool(code.co_flags & inspect.CO_NEWLOCALS) and not code.co_name.startswith("<")  # not a lambda, a comprehension


def _bytes_of(tensor: Any) -> bytes:
    torch = sys.modules["torch"]
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@functools.cache
def _installed(module: str) -> bool:
    """Whether a module came with Python or a package manager: its version says what it does."""
    found = sys.modules.get(module)
    if module == "builtins" or module in sys.builtin_module_names:
        return True
    file = getattr(found, "__file__", None)
    if module == "__main__" or file is None:
        return module != "__main__" and module.split(".")[0] in sys.stdlib_module_names
    places = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return bool(places & set(Path(file).resolve().parents))


def digest_of(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
