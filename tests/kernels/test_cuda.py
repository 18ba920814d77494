"""The CUDA kernel without a GPU: the same source, run thread by thread by emulate.h, against the float64 loop."""

import ctypes
import shutil

import pytest
import torch

from sigma_lite.kernels import choose_backend, grouped_swiglu
from sigma_lite.kernels.cuda import binding
from sigma_lite.kernels.cuda.op import _backward_op, _forward_op, check_once, tile_rows

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
LATE = [0, 1]  # asynchronous copies land when they are issued, or only when they are waited for


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv(binding.EMULATE, "1")


def problem(T: int, K: int, E: int, D: int, F: int, dtype: torch.dtype, kind: str = "zipf"):
    torch.manual_seed(0)
    weights = {"zipf": 1 / torch.arange(1, E + 1), "multinomial": torch.ones(E), "one": torch.arange(E, 0, -1) ** 30.0}[kind]
    ids = torch.arange(K).expand(T, K).clone() if kind == "one" else torch.multinomial(weights.expand(T, E), K)
    tensors = (torch.randn(T, D), torch.rand(T, K), torch.randn(E, 2 * F, D) / D**0.5, torch.randn(E, D, F) / F**0.5)
    return ids, [t.to(dtype).requires_grad_() for t in tensors], torch.randn(T, D).to(dtype)


def run(ids, tensors, dy, backend):
    y = grouped_swiglu(tensors[0], ids, *tensors[1:], backend=backend)
    return [y, *torch.autograd.grad(y, tensors, dy)]


def check(ids, tensors, dy, tolerance: float) -> list[torch.Tensor]:
    exact = run(ids, [t.detach().double().requires_grad_() for t in tensors], dy.double(), "loop")
    ours = run(ids, tensors, dy, "cuda")
    for name, a, b in zip(("y", "dx", "dgate", "dw13", "dw2"), ours, exact, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
    return ours


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("tile", ["32", "64", "128"])
@pytest.mark.parametrize(
    ("T", "K", "E", "D", "F", "kind"),
    [
        (150, 1, 4, 200, 72, "zipf"),  # neither width a multiple of the tile; four tiles of k, more than are under way
        (45, 3, 5, 72, 136, "multinomial"),  # an odd number of rows
        (1, 2, 3, 8, 8, "one"),  # one token, one chunk of 16 bytes, an expert without tokens
    ],
)
def test_equals_the_float64_loop(monkeypatch, late, tile, T, K, E, D, F, kind):
    monkeypatch.setenv("SIGMA_LITE_CUDA_TILE", tile)
    binding.emulator_library().sigma_emulate_late(late)
    check(*problem(T, K, E, D, F, torch.bfloat16, kind), tolerance=1e-2)


def test_float16():
    check(*problem(70, 2, 3, 72, 40, torch.float16), tolerance=1e-3)


def test_all_tokens_to_one_expert_and_nothing_from_the_others():
    *_, dw13, dw2 = check(*problem(70, 1, 3, 64, 64, torch.bfloat16, "one"), tolerance=1e-2)
    assert dw13[1:].abs().max() == dw2[1:].abs().max() == 0


def test_no_tokens():
    y, dx, dgates, dw13, dw2 = run(*problem(0, 2, 3, 64, 64, torch.bfloat16), "cuda")
    assert y.shape == dx.shape == (0, 64) and dgates.shape == (0, 2)
    assert dw13.abs().max() == dw2.abs().max() == 0


@pytest.mark.parametrize("n_slots", [1, 31, 33, 257, 70_000])
def test_the_plan_is_a_stable_sort_and_its_tiles_cover_every_row_once(n_slots):
    torch.manual_seed(n_slots)
    E, tile, D = 7, 64, 8
    ids = torch.randint(0, E - 1, (n_slots, 1))  # the last expert gets nothing
    inputs = torch.zeros(n_slots, D, dtype=torch.bfloat16), ids, torch.ones(n_slots, 1)
    weights = torch.zeros(E, 16, D, dtype=torch.bfloat16), torch.zeros(E, D, 8, dtype=torch.bfloat16)
    if n_slots > 1000:  # the plan alone: multiplying so many rows thread by thread takes a minute
        slot, token, ends, tiles = plan_only(ids, E, tile)
    else:
        _, _, slot, token, ends, tiles = _forward_op(*inputs, *weights, tile, False)
    assert torch.equal(slot.long(), ids.flatten().argsort(stable=True)) and torch.equal(token, slot)
    assert torch.equal(ends.long(), torch.bincount(ids.flatten(), minlength=E).cumsum(0))
    live = tiles[tiles[:, 0] >= 0].tolist()
    covered = [row for e, first in live for row in range(first, min(first + tile, int(ends[e])))]
    assert covered == list(range(n_slots))
    assert all(int(torch.searchsorted(ends, first, right=True)) == e for e, first in live)


def plan_only(ids, E, tile):
    n, ints = ids.numel(), {"dtype": torch.int32}
    chunk = -(-n // 256)
    sizes = {"tokens": n, "k": 1, "experts": E, "tile": tile, "chunk": chunk, "chunks": -(-n // chunk)}
    slot, token, ends, tiles = (torch.empty(s, **ints) for s in ((n,), (n,), (E,), (n // tile + E, 2)))
    counts = torch.empty(256, E, **ints)
    plan = {"slot": slot, "token": token, "ends": ends, "tiles": tiles}
    binding.call("plan", {"ids": ids, "counts": counts, **plan}, **sizes, max_tiles=len(tiles))
    return slot, token, ends, tiles


OUTPUTS = {
    "plan": ("counts", "slot", "token", "ends", "tiles"),
    "forward": ("z", "h", "y"),
    "backward": ("dz", "gated_h", "dgates", "dx", "dw13", "dw2"),
}


def fenced(tensor: torch.Tensor, is_output: bool, fences: list[torch.Tensor]) -> torch.Tensor:
    """A copy between two stretches of NaN, or NaN throughout if it is to be written."""
    fence, size = 4096, tensor.nbytes
    memory = torch.full((size + 2 * fence,), 255, dtype=torch.uint8)
    fences += [memory[:fence], memory[fence + size :]]
    inside = memory[fence : fence + size].view(tensor.dtype).view(tensor.shape)
    return inside if is_output else inside.copy_(tensor)


@pytest.mark.parametrize("tile", ["32", "64", "128"])
def test_every_output_is_written_and_nothing_beside_it_is_written_or_read(monkeypatch, tile):
    right = binding.call

    def call(function, tensors, **numbers):
        fences: list[torch.Tensor] = []
        copies = {n: t if t is None else fenced(t, n in OUTPUTS[function], fences) for n, t in tensors.items()}
        right(function, copies, **numbers)
        assert all((fence == 255).all() for fence in fences), f"{function} writes outside its tensors"
        for name in OUTPUTS[function]:
            if tensors[name] is not None:
                tensors[name].copy_(copies[name])

    monkeypatch.setenv("SIGMA_LITE_CUDA_TILE", tile)
    check_once(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr("sigma_lite.kernels.cuda.op.call", call)
    check(*problem(67, 2, 4, 72, 136, torch.bfloat16), tolerance=1e-2)  # NaN from a fence would show


def test_the_swizzle_leaves_no_bank_conflict():
    """ldmatrix reads eight rows at once: the emulator counts those whose banks another row of the eight uses."""
    conflicts = binding.emulator_library().sigma_bank_conflicts
    conflicts.restype = ctypes.c_long
    run(*problem(70, 1, 3, 136, 72, torch.bfloat16), "cuda")
    assert conflicts() == 0


def test_twice_the_same_bits_and_both_copy_orders_agree():
    ids, tensors, dy = problem(90, 2, 4, 72, 72, torch.bfloat16)
    results = []
    for late in (0, 0, 1):
        binding.emulator_library().sigma_emulate_late(late)
        results.append(run(ids, tensors, dy, "cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_pre_activations_are_written_where_no_backward_will_follow():
    ids, tensors, _ = problem(40, 1, 3, 64, 64, torch.bfloat16)
    x, gates, w13, w2 = (t.detach() for t in tensors)
    y, z, *_ = _forward_op(x, ids, gates.float(), w13, w2, 64, False)
    assert z.numel() == 0 and torch.equal(y, grouped_swiglu(x, ids, gates, w13, w2, backend="cuda"))


@pytest.mark.slow
def test_the_operators_describe_themselves():
    ids, tensors, dy = problem(9, 2, 3, 16, 8, torch.bfloat16)
    x, gates, w13, w2 = (t.detach() for t in tensors)
    inputs = (x, ids, gates.float(), w13, w2, 32)
    torch.library.opcheck(_forward_op, (*inputs, True))
    _, *kept = _forward_op(*inputs, True)
    torch.library.opcheck(_backward_op, (dy, x, gates.float(), w13, w2, *kept, 32))


@pytest.mark.slow
def test_compiled_in_one_graph_with_the_same_bits():
    ids, tensors, dy = problem(33, 2, 3, 64, 64, torch.bfloat16)
    compiled = torch.compile(grouped_swiglu, fullgraph=True, backend="aot_eager")  # a graph break would raise
    x, *rest = tensors
    outputs = [f(x, ids, *rest, backend="cuda") for f in (grouped_swiglu, compiled)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y, tensors, dy) for y in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_expanded_gradients_slices_and_odd_addresses_are_fine():
    ids, (x, gates, w13, w2), _ = problem(33, 2, 3, 64, 64, torch.bfloat16)
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x.detach()).requires_grad_()
    assert odd.data_ptr() % 16
    grouped_swiglu(odd, ids, gates, w13, w2, backend="cuda").sum().backward()
    grouped_swiglu(x, ids, gates, w13, w2, backend="cuda").sum().backward()
    assert torch.equal(odd.grad, x.grad) and x.grad.isfinite().all()


def test_tiles_are_as_tall_as_the_average_expert_needs(monkeypatch):
    assert [tile_rows(96 * rows, 96) for rows in (1, 32, 33, 128, 129, 5000)] == [32, 32, 64, 64, 128, 128]
    monkeypatch.setenv("SIGMA_LITE_CUDA_TILE", "48")
    with pytest.raises(ValueError, match="SIGMA_LITE_CUDA_TILE=48: the kernel is compiled for tiles of 32, 64 or 128 rows"):
        tile_rows(1, 1)


@pytest.mark.parametrize(
    ("x", "w13", "why"),
    [
        (torch.zeros(2, 16), torch.zeros(3, 16, 16), "float32, and the tensor cores multiply bfloat16 or float16"),
        (torch.zeros(2, 12).bfloat16(), torch.zeros(3, 16, 12).bfloat16(), "D=12 is not a multiple of 8"),
        (torch.zeros(2, 16).bfloat16(), torch.zeros(3, 24, 16).bfloat16(), "F=12 is not a multiple of 8"),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(1025, 16, 8).bfloat16(), "E=1025 experts"),
    ],
)
def test_obstacles_are_named(x, w13, why):
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot run this: {why}"):
        choose_backend(x, w13, "cuda")


def test_it_is_never_chosen_by_itself_and_wants_a_gpu(monkeypatch):
    x, w13 = torch.zeros(2, 16).bfloat16(), torch.zeros(3, 16, 16).bfloat16()
    assert choose_backend(x, w13)[0] == "grouped" and choose_backend(x, w13, "cuda")[0] == "cuda"
    monkeypatch.delenv(binding.EMULATE)
    with pytest.raises(ValueError, match="tensors on cpu, and it needs a GPU"):
        choose_backend(x, w13, "cuda")


def test_the_first_use_finds_a_kernel_that_computes_something_else(monkeypatch):
    right = binding.call

    def wrong(function, tensors, **numbers):
        right(function, tensors, **numbers)
        if function == "backward":
            tensors["dw2"].mul_(1.1)

    monkeypatch.setattr("sigma_lite.kernels.cuda.op.call", wrong)
    with pytest.raises(RuntimeError, match="differs from the float64 loop on cpu in dw2 by 1.0e-01"):
        check_once.__wrapped__(torch.device("cpu"), torch.bfloat16)
