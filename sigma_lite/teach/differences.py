"""The first difference between two values or two functions, in words that help and do not give the answer away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float = 1e-4
    atol: float = 1e-6


EXACT_ENOUGH = Tolerance()
NOTHING = "nothing there yet: the function returns no result"


def difference(mine: object, reference: object, axes: str = "", tolerance: Tolerance = EXACT_ENOUGH) -> str:
    """What is wrong with `mine`, type first, then dtype, shape and value; "" when nothing is.

    `axes` are the letters of an array's shape, such as "TE"; they name sizes and positions. A list may stand for a numpy
    array. Whole numbers are compared exactly, floats within `tolerance`.
    """
    if reference is not None and (mine is None or mine is Ellipsis or mine is NotImplemented):
        return NOTHING
    if isinstance(reference, np.ndarray) and isinstance(mine, (list, tuple)):
        mine = _from_list(mine, reference)
    if isinstance(reference, (Tensor, np.ndarray)):
        return _array(mine, reference, axes, tolerance)
    if isinstance(reference, Mapping):
        return _mapping(mine, reference, tolerance)
    if isinstance(reference, Sequence) and not isinstance(reference, (str, bytes)):
        return _sequence(mine, reference, tolerance)
    if isinstance(reference, (int, float)) and not isinstance(reference, bool):
        return _number(mine, reference, tolerance)
    if isinstance(reference, (str, bool)) and not isinstance(
        mine, (str,) if isinstance(reference, str) else (bool, np.bool_)
    ):
        return f"type: yours is {_type(mine)}, expected {_type(reference)}"
    return "" if mine == reference else f"value: yours is {mine!r}"


def call_difference(
    mine: Callable, reference: Callable, inputs: Sequence[object], axes: str = "", tolerance: Tolerance = EXACT_ENOUGH
) -> str:
    """The same for two functions called with copies of `inputs`; results first, then the gradient of each input."""
    mine_in, reference_in = _copies(inputs), _copies(inputs)
    got, wanted = mine(*mine_in), reference(*reference_in)
    problem = difference(got, wanted, axes, tolerance)
    pairs = zip(_parts(got), _parts(wanted), strict=False)
    learned = [(a, b) for a, b in pairs if isinstance(b, Tensor) and b.requires_grad]
    if problem or not learned:
        return problem
    if not all(a.requires_grad for a, _ in learned):
        return "gradient: none reaches the inputs; is there a detach, an item() or an argmax on the way?"
    # unequal weights: the gradient of a plain sum is blind to anything that only reorders the result
    draw = torch.Generator().manual_seed(0)
    weights = [torch.rand(wanted.shape, generator=draw).to(wanted.dtype) for _, wanted in learned]
    for results in zip(*learned, strict=True):
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
    for number, (a, b) in enumerate(zip(mine_in, reference_in, strict=True), start=1):
        if isinstance(b, Tensor) and b.grad is not None:
            wrong = "none arrives" if a.grad is None else difference(a.grad, b.grad, "", tolerance)
            if wrong:
                return f"gradient of argument {number}: {wrong}"
    return ""


def _parts(result: object) -> Sequence[object]:
    return result if isinstance(result, (tuple, list)) else (result,)


def _copies(inputs: Sequence[object]) -> list:
    def copy(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.is_floating_point())

    return [copy(value) for value in inputs]


def _array(mine: object, reference: Tensor | np.ndarray, axes: str, tolerance: Tolerance) -> str:
    if not isinstance(mine, type(reference)):
        return f"type: yours is {_type(mine)}, expected {_type(reference)}"
    if mine.dtype != reference.dtype:
        return f"dtype: yours is {_dtype(mine)}, expected {_dtype(reference)}"
    if tuple(mine.shape) != tuple(reference.shape):
        return f"shape: yours is {_shape(mine, axes)}, expected {_shape(reference, axes)}"
    a, b = _numbers(mine), _numbers(reference)
    wrong = ~np.isclose(a, b, *tolerance, equal_nan=True)
    if not wrong.any():
        return ""
    if wrong.size == 1:  # a single number has no place, and no order
        return f"value: {_too(a.item(), b.item())}"
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    named = ", ".join(f"{letter.lower()}={i}" for letter, i in zip(axes, place, strict=False))
    where = named if len(axes) == len(place) else str(list(place))
    return (
        f"value: first wrong at {where} (yours is {a[place]:.6g}); {wrong.sum()} of {wrong.size} are wrong{_pattern(a, b)}"
    )


def _pattern(a: np.ndarray, b: np.ndarray) -> str:
    """What kind of wrong it is, when the numbers tell: a factor, an offset, a sign, an order."""
    if not np.isfinite(a).all():
        return "; there are nan or inf among yours"
    if np.allclose(a, -b):
        return "; everywhere the opposite sign"
    if np.allclose(np.sort(a, None), np.sort(b, None)):
        return "; they are the right numbers in another order"
    nonzero = np.abs(b) > 1e-12
    if nonzero.any() and np.allclose(a[~nonzero], 0) and np.ptp(ratio := a[nonzero] / b[nonzero]) < 1e-4 * abs(ratio.mean()):
        digits = ".4g" if f"{ratio.mean():.4g}" != "1" else ".6g"
        return f"; everywhere {ratio.mean():{digits}} times what it should be"
    if np.ptp(a - b) < 1e-5 * max(1.0, abs((a - b).mean())):
        return "; everywhere off by the same amount"
    return ""


def _number(mine: object, reference: float, tolerance: Tolerance) -> str:
    if isinstance(mine, (Tensor, np.generic)) and np.ndim(mine) == 0:
        mine = mine.item()
    if isinstance(mine, bool) or not isinstance(mine, (int, float)):
        return f"type: yours is {_type(mine)}, expected a number"
    whole = isinstance(reference, int)
    if mine == reference if whole else np.isclose(mine, reference, *tolerance, equal_nan=True):
        return ""
    return f"value: {_too(mine, reference, whole)}"


def _too(mine: float, reference: float, whole: bool = False) -> str:
    """How a single number is wrong; a whole number is shown with all its digits, since the last one may be the wrong one."""
    if not np.isfinite(mine):
        return f"yours is {mine}"
    if reference and np.isclose(mine, -reference):
        return f"yours is {mine:.6g}; it has the opposite sign"
    shown = f"{mine:,}" if whole else f"{mine:.6g}"
    return f"yours is {shown}, which is too {'large' if mine > reference else 'small'}"


def _from_list(mine: Sequence, reference: np.ndarray) -> object:
    """The list as an array of the reference's dtype, or as it is when it holds numbers of another kind or none."""
    try:
        array = np.asarray(mine)
    except ValueError:  # rows of different lengths
        return mine
    return array.astype(reference.dtype) if array.dtype.kind == reference.dtype.kind else mine


def _sequence(mine: object, reference: Sequence, tolerance: Tolerance) -> str:
    if not isinstance(mine, Sequence) or isinstance(mine, (str, bytes)):
        return f"type: yours is {_type(mine)}, expected {_type(reference)}"
    if len(mine) != len(reference):
        return f"length: yours has {len(mine)} items, expected {len(reference)}"
    count = len(reference)
    names = getattr(reference, "_fields", None) or [f"item {place} of {count}" for place in range(1, count + 1)]
    return _first(zip(names, mine, reference, strict=True), tolerance)


def _mapping(mine: object, reference: Mapping, tolerance: Tolerance) -> str:
    if not isinstance(mine, Mapping):
        return f"type: yours is {_type(mine)}, expected a dict"
    for problem, keys in (("missing", reference.keys() - mine.keys()), ("not expected", mine.keys() - reference.keys())):
        if keys:
            return f"keys: {', '.join(sorted(map(repr, keys)))} {problem}"
    return _first(((repr(key), mine[key], reference[key]) for key in reference), tolerance)


def _first(items, tolerance: Tolerance) -> str:
    for name, a, b in items:
        problem = difference(a, b, "", tolerance)
        if problem:
            return f"{name}: {problem}"
    return ""


def _numbers(array: Tensor | np.ndarray) -> np.ndarray:
    array = array.detach().cpu().double().numpy() if isinstance(array, Tensor) else array
    return array.astype(np.float64)


def _shape(array: Tensor | np.ndarray, axes: str) -> str:
    letters = axes if len(axes) == len(array.shape) else ""
    return "[" + ", ".join(f"{letters[i]}={size}" if letters else str(size) for i, size in enumerate(array.shape)) + "]"


def with_article(value: object) -> str:
    """ "a torch tensor", "a str", "an int"."""
    name = _type(value)
    return name if name.startswith("a ") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _type(value: object) -> str:
    if type(value).__module__ == "torch.return_types" and hasattr(value, "indices"):  # of max, topk, sort
        return f"a pair from torch.{type(value).__name__}, values and their places"
    return {"Tensor": "a torch tensor", "ndarray": "a numpy array"}.get(type(value).__name__, type(value).__name__)


def _dtype(array: Tensor | np.ndarray) -> str:
    return str(array.dtype).removeprefix("torch.")
