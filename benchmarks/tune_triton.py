"""On a GPU: try other tiles for each Triton kernel, one kernel at a time, and print the table that was fastest.

Every candidate must give the output and gradients of the tiles it would replace, to 1e-2, before it is timed. The time is
that of forward and backward together, medians by triton's do_bench; a candidate must win by 1 % to be taken. Nothing is
written: paste what it prints into sigma_lite/kernels/triton_tiles.py.

    python benchmarks/tune_triton.py [-T 32768] [-K 1] [-E 96] [-D 1536] [-F 768]
"""

from __future__ import annotations

import argparse
import itertools

import torch
import triton

from sigma_lite.kernels import triton_tiles
from sigma_lite.kernels.triton_grouped import backward_with, forward_with
from sigma_lite.kernels.triton_tiles import LONG, TILES, Launcher, rows_per_tile

COLUMNS, DEPTHS, WARPS, STAGES = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)


def problem(T: int, K: int, E: int, D: int, F: int):
    """A multinomial routing: uneven, as at the start of training."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    ids = torch.rand(T, E, device="cuda").topk(K).indices
    return new(T, D), ids, torch.rand(T, K, device="cuda"), new(E, 2 * F, D) / D**0.5, new(E, D, F) / F**0.5, new(T, D)


def step(launch: Launcher, x, ids, gates, w13, w2, dy) -> list[torch.Tensor]:
    y, *kept = forward_with(launch, x, ids, gates, w13, w2)
    return [y, *backward_with(launch, dy, *kept, x, gates, w13, w2)]


def milliseconds(launch: Launcher, tensors, expected: list[torch.Tensor] | None) -> float:
    """Infinity for tiles that do not fit, do not compile, or compute something else."""
    try:
        results = step(launch, *tensors)
        for ours, other in zip(results, expected or results, strict=True):
            if not (ours.float() - other.float()).norm() <= 1e-2 * other.float().norm():
                return float("inf")
        return triton.testing.do_bench(lambda: step(launch, *tensors), return_mode="median")
    except Exception as error:
        print("      ", type(error).__name__, str(error).splitlines()[:1])
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("T", 32768), ("K", 1), ("E", 96), ("D", 1536), ("F", 768)):
        parser.add_argument(f"-{name}", type=int, default=default)
    args = parser.parse_args()
    tensors, launch = problem(args.T, args.K, args.E, args.D, args.F), Launcher(torch.device("cuda", 0))
    expected = step(launch, *tensors)
    best = milliseconds(launch, tensors, expected)
    print(f"{torch.cuda.get_device_name()}, triton {triton.__version__}, {vars(args)}: {best:.3f} ms before")
    slots = args.T * args.K
    rows = rows_per_tile(slots, args.E, torch.bfloat16)
    for kernel, entries in TILES.items():
        key = ("long" if slots // args.E >= LONG else "short") if kernel == "weight_gradient" else rows
        BM, chosen = entries[key][0], entries[key]
        for BN, BK, warps, stages in itertools.product(COLUMNS, DEPTHS, WARPS, STAGES):
            columns = BN * (2 if kernel == "swiglu_forward" else 1)
            if stages * (BM + columns) * BK * 2 > launch.shared or BM * columns > warps * 32 * 128:
                continue  # does not fit into shared memory, or into registers
            entries[key] = (BM, BN, BK, warps, stages)
            time = milliseconds(launch, tensors, expected)
            if time < 0.99 * best:
                best, chosen = time, entries[key]
                print(f"  {kernel} {key}: {chosen} {best:.3f} ms", flush=True)
        entries[key] = chosen
    for kernel in TILES:
        print(f"{kernel!r}: {triton_tiles.TILES[kernel]}")


if __name__ == "__main__":
    main()
