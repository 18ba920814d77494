"""Run the Triton kernels in Triton's interpreter and print what came out; test_triton.py starts this and judges.

A process of its own: the interpreter replaces the kernels when triton is imported, once and for all.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from sigma_lite.kernels import grouped_swiglu
from sigma_lite.kernels.trial import trial_errors
from sigma_lite.kernels.triton_check import TOKENS, _once
from sigma_lite.kernels.triton_grouped import _backward_op, _forward_op
from sigma_lite.kernels.triton_plan import max_tiles, tile_plan
from sigma_lite.kernels.triton_tiles import Launcher

E, D, F = 4, 48, 48  # in fp32 blocks are 32 wide, otherwise 64
CPU = torch.device("cpu")
NAMES = ("y", "dx", "dgates", "dw13", "dw2")


def routing(kind: str, T: int, K: int) -> torch.Tensor:
    if kind == "balanced":
        return (torch.arange(T)[:, None] + torch.arange(K)) % E
    if kind == "one expert":
        return ((torch.arange(K) + 2) % E).expand(T, K).clone()
    weights = torch.ones(E) if kind == "multinomial" else 1 / torch.arange(1, E + 1) ** 2
    return torch.multinomial(weights.expand(T, E), K) if T else torch.zeros(0, K, dtype=torch.int64)


def problem(kind: str, T: int, K: int, dtype: torch.dtype):
    torch.manual_seed(0)
    shapes = ((T, D), (T, K), (E, 2 * F, D), (E, D, F))
    scales = (1, 1, D**-0.5, F**-0.5)
    tensors = [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]
    return routing(kind, T, K), tensors, torch.randn(T, D).to(dtype)


def run(backend: str, ids, tensors, dy) -> list[torch.Tensor]:
    x, gates, w13, w2 = leaves = [t.clone().requires_grad_() for t in tensors]
    y = grouped_swiglu(x, ids, gates, w13, w2, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def errors(kind: str, T: int, K: int, dtype: str) -> dict[str, float]:
    ids, tensors, dy = problem(kind, T, K, getattr(torch, dtype))
    ours = run("triton", ids, tensors, dy)
    exact = run("loop", ids, [t.double() for t in tensors], dy.double())
    return {
        n: float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for n, a, b in zip(NAMES, ours, exact, strict=True)
    }


def plan_is_the_stable_sort(T: int, K: int, E: int, rows: int) -> bool:
    ids = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(T))
    slot_N, ends_E, (expert_M, first_M) = tile_plan(Launcher(CPU), ids, E, rows)
    counts_E = torch.bincount(ids.flatten(), minlength=E)
    tiles = [
        (e, first)
        for e, (end, count) in enumerate(zip(counts_E.cumsum(0).tolist(), counts_E.tolist(), strict=True))
        for first in range(end - count, end, rows)
    ]
    used = expert_M >= 0
    return (
        torch.equal(slot_N.long(), ids.flatten().argsort(stable=True))
        and torch.equal(ends_E.long(), counts_E.cumsum(0))
        and list(zip(expert_M[used].tolist(), first_M[used].tolist(), strict=True)) == tiles
        and bool(used[: len(tiles)].all())
        and len(expert_M) == max_tiles(T * K, E, rows)
    )


def compiled_has_the_same_bits() -> bool:
    ids, tensors, dy = problem("zipf", 9, 2, torch.float32)
    results = []
    for function in (grouped_swiglu, torch.compile(grouped_swiglu, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(leaves[0], ids, *leaves[1:], backend="triton")
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def operators_describe_themselves() -> bool:
    ids, (x, gates, w13, w2), dy = problem("multinomial", 9, 2, torch.float32)
    torch.library.opcheck(_forward_op, (x, ids, gates, w13, w2))
    _, *kept = _forward_op(x, ids, gates, w13, w2)
    torch.library.opcheck(_backward_op, (dy, *kept, x, gates, w13, w2))
    return True


def main() -> None:
    kinds = ("balanced", "multinomial", "zipf", "one expert")
    cases = [(kind, 19, K, "float32") for kind in kinds for K in (1, 2)]
    cases += [("zipf", 1, 1, "float32"), ("zipf", 19, 4, "float32")]
    cases += [("multinomial", 19, 1, "bfloat16"), ("zipf", 19, 2, "bfloat16"), ("zipf", 19, 1, "float16")]
    facts = {"errors": {" ".join(map(str, case)): errors(*case) for case in cases}}
    for rows, dtype in ((32, torch.float32), (128, torch.bfloat16)):
        layer = {"T": TOKENS[rows] * 3 // 2, "D": 48, "F": 80, "E": 3}
        facts["errors"][f"tiles of {rows} rows, {str(dtype)[6:]}"] = trial_errors(_once, CPU, dtype, **layer)

    nothing = run("triton", *problem("zipf", 0, 2, torch.float32))
    facts["no tokens"] = [list(nothing[0].shape), float(nothing[3].abs().max()), float(nothing[4].abs().max())]
    idle = run("triton", *problem("one expert", 19, 1, torch.float32))
    facts["idle experts"] = [float(dw[[0, 1, 3]].abs().max()) for dw in idle[3:]]
    ids, tensors, dy = problem("zipf", 9, 2, torch.float32)
    ones = [run("triton", ids, tensors, dy) for dy in (torch.ones(9, D), torch.ones(1, 1).expand(9, D))]
    facts["expanded gradient"] = all(torch.equal(a, b) for a, b in zip(*ones, strict=True))
    first, second = (run("triton", *problem("zipf", 19, 2, torch.bfloat16)) for _ in range(2))
    facts["same bits"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    sizes = ((1, 1, 3, 16), (5, 1, 1, 16), (7, 2, 3, 16), (150, 2, 20, 16), (129, 3, 4, 64), (0, 1, 3, 16))
    facts["plans"] = {str(size): plan_is_the_stable_sort(*size) for size in sizes}
    facts["compiled"] = compiled_has_the_same_bits()
    facts["operators"] = operators_describe_themselves()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
