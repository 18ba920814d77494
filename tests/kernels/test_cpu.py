"""The C++ kernel equals the float64 loop for every vector length that this machine can run, at any number of threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sigma_lite.kernels import choose_backend, grouped_swiglu
from sigma_lite.kernels.compiler import BuildError, build, find_cxx
from sigma_lite.kernels.compiler import run as said_by
from sigma_lite.kernels.cpu import binding, op

try:
    find_cxx("this test")
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

E, D, F = 12, 48, 16  # D is not 2F, so that a shape taken for another shows
NAMES = ("y", "dx", "dgate", "dw13", "dw2")


def routing(kind: str, T: int, K: int) -> torch.Tensor:
    if kind == "one expert":
        return torch.arange(K).expand(T, K).clone()
    weights = torch.ones(E) if kind == "multinomial" else 1 / torch.arange(1.0, E + 1) ** 2
    return torch.multinomial(weights.expand(T, E), K) if T else torch.zeros(0, K, dtype=torch.int64)


def problem(T: int, K: int, kind: str, width: int = D, units: int = F):
    torch.manual_seed(0)
    shapes = ((T, width), (T, K), (E, 2 * units, width), (E, width, units))
    scales = (1, 1, width**-0.5, units**-0.5)
    return routing(kind, T, K), [
        (torch.randn(shape) * scale).requires_grad_() for shape, scale in zip(shapes, scales, strict=True)
    ]


def run(ids, tensors, backend, weight):
    x, gates, w13, w2 = tensors
    y = grouped_swiglu(x, ids, gates, w13, w2, backend=backend)
    return [y, *torch.autograd.grad((y * weight).sum(), tensors)]


def assert_exact(ids, tensors):
    weight = torch.randn(tensors[0].shape)
    exact = run(ids, [t.detach().double().requires_grad_() for t in tensors], "loop", weight.double())
    for name, ours, b in zip(NAMES, run(ids, tensors, "cpu", weight), exact, strict=True):
        error = (ours.double() - b).norm() / b.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.fixture(params=[("-march=native",), ("-march=native", "-mno-avx512f"), ("-march=native", "-mno-avx")], ids=" ".join)
def vectors(request, monkeypatch):
    """The library compiled for shorter vectors too, down to the four floats of NEON."""
    command = (find_cxx("this test"), *request.param, *binding.OPTIONS)
    try:
        machine = said_by([command[0], "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])
        loaded = ctypes.CDLL(str(build(command, binding.SOURCES, machine)))
    except BuildError:
        pytest.skip(f"this compiler does not know {request.param}")
    monkeypatch.setattr(binding, "library", lambda: loaded)


@pytest.mark.parametrize("kind", ["multinomial", "zipf", "one expert"])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 3), (65, 1), (190, 2), (64, 12)])
def test_equals_the_float64_loop(vectors, kind, T, K):
    assert_exact(*problem(T, K, kind))


@pytest.mark.parametrize("tokens", range(1, 300, 19))
def test_any_number_of_tokens_in_one_expert(vectors, tokens):
    """Up to several panels: every mixture of full, half-full and single vectors, and a second one that adds to the first."""
    assert_exact(*problem(tokens, 1, "one expert", 32, 32))


def test_wider_than_what_is_fetched_ahead(vectors):
    assert_exact(*problem(40, 2, "multinomial", 272, 144))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    ids, tensors = problem(700, 3, "zipf")
    weight = torch.randn(700, D)
    alone = run(ids, tensors, "cpu", weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(alone, run(ids, tensors, "cpu", weight), strict=True))


def test_no_tokens_and_idle_experts():
    ids, tensors = problem(0, 2, "zipf")
    y, dx, _, dw13, dw2 = run(ids, tensors, "cpu", torch.zeros(0, D))
    assert y.shape == dx.shape == (0, D)
    assert dw13.abs().max() == dw2.abs().max() == 0
    ids, tensors = problem(33, 1, "one expert")
    _, _, _, dw13, dw2 = run(ids, tensors, "cpu", torch.ones(33, D))
    assert dw13[1:].abs().max() == dw2[1:].abs().max() == 0 and dw13[0].abs().min() > 0


def test_strided_inputs_and_gradients():
    ids, (x, gates, w13, w2) = problem(20, 2, "multinomial")
    plain = grouped_swiglu(x, ids, gates, w13, w2, backend="cpu")
    wide = torch.cat((x, x), 1)[:, :D], torch.stack((ids, ids), 2)[..., 0]
    assert torch.equal(plain, grouped_swiglu(*wide, gates, w13.mT.contiguous().mT, w2, backend="cpu"))
    (dx,) = torch.autograd.grad(plain.sum(), x)  # a gradient of stride 0
    assert torch.isfinite(dx).all() and dx.abs().max() > 0


def test_extreme_and_broken_numbers_pass_through():
    """Beyond the range of exp the gate is linear or shut; a NaN is not hidden, and stays with its token."""
    ids, (x, gates, w13, w2) = problem(3, 1, "one expert")
    with torch.no_grad():
        for scale in (100.0, 1e4):
            exact = grouped_swiglu(*(t.double() * s for t, s in ((x, scale),)), ids, *(t.double() for t in (gates, w13, w2)))
            ours = grouped_swiglu(x * scale, ids, gates, w13, w2, backend="cpu")
            assert (ours - exact).norm() <= 1e-5 * exact.norm()
        x[1, 0] = float("nan")
        y = grouped_swiglu(x, ids, gates, w13, w2, backend="cpu")
    assert y.isnan().all(1).tolist() == [False, True, False] and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, E])
def test_an_expert_that_does_not_exist_is_refused(wrong):
    ids, tensors = problem(5, 1, "one expert")
    ids[3] = wrong
    with pytest.raises(IndexError, match=f"ids must lie in 0..{E - 1}, these reach from {min(wrong, 0)} to {max(wrong, 0)}"):
        run(ids, tensors, "cpu", 1)


def test_chosen_where_it_can_run_and_the_rules_are_named():
    x, w13 = torch.zeros(3, 16), torch.zeros(4, 32, 16)
    assert choose_backend(x, w13)[0] == "cpu"
    assert choose_backend(x.bfloat16(), w13.bfloat16())[0] == "grouped"
    with pytest.raises(
        ValueError, match="'cpu' cannot run this: bfloat16, and it computes in float32; use 'loop' or 'auto'"
    ):
        choose_backend(x.bfloat16(), w13.bfloat16(), "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot run this: F=12 is not a multiple of 16"):
        choose_backend(x, torch.zeros(4, 24, 16), "cpu")


@pytest.fixture
def first_use():
    for cached in (op.trial, binding.library, build):
        cached.cache_clear()
    yield
    for cached in (op.trial, binding.library, build):
        cached.cache_clear()


def test_without_a_compiler_the_torch_path_takes_over_silently(first_use, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    x, w13 = torch.zeros(3, 16), torch.zeros(4, 32, 16)
    assert choose_backend(x, w13)[0] == "grouped"
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    with pytest.raises(ValueError, match=r"backend 'cpu' needs a C\+\+ compiler: install g\+\+ or set CXX"):
        choose_backend(x, w13, "cpu")


def test_without_a_folder_to_keep_it_in_too(first_use, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="goes on without it"):
        assert choose_backend(torch.zeros(3, 16), torch.zeros(4, 32, 16))[0] == "grouped"


def test_a_kernel_that_computes_something_else_is_not_used(first_use, monkeypatch):
    right = binding.call

    def wrong(function, sizes, **tensors):
        right(function, sizes, **tensors)
        if function == "backward":
            tensors["dw2"].mul_(1.1)

    monkeypatch.setattr(op, "call", wrong)
    with pytest.warns(UserWarning, match="differs from the float64 loop in dw2 by 1.0e-01; backend='auto' goes on without"):
        assert choose_backend(torch.zeros(3, 16), torch.zeros(4, 32, 16))[0] == "grouped"


@pytest.mark.slow
def test_the_operators_describe_themselves_and_compile_in_one_graph():
    ids, (x, *rest) = problem(33, 2, "zipf")
    inputs = [t.detach() for t in (x, ids, *rest)]
    rules = ("test_schema", "test_faketensor")  # others compare all outputs, and the end of z is never written
    torch.library.opcheck(op._forward_op, inputs, test_utils=rules)
    _, *kept = op._forward_op(*inputs)
    torch.library.opcheck(op._backward_op, (torch.randn(33, D), *kept, inputs[0], *inputs[2:]), test_utils=rules)
    compiled = torch.compile(grouped_swiglu, fullgraph=True, backend="aot_eager")  # a graph break would raise
    outputs = [f(x, ids, *rest) for f in (grouped_swiglu, compiled)]
    gradients = [torch.autograd.grad(y.square().sum(), (x, *rest)) for y in outputs]
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_its_trial_may_come_inside_a_checkpointed_layer():
    """The first layer of a model that recomputes asks for the trial; what that keeps is not the layer's."""
    op.trial.cache_clear()
    x, w13, w2 = (torch.randn(shape, requires_grad=True) for shape in ((24, 16), (4, 32, 16), (4, 16, 16)))
    ids, gates = torch.randint(4, (24, 1)), torch.ones(24, 1)
    y = checkpoint(lambda: grouped_swiglu(x, ids, gates, w13, w2), use_reentrant=False)
    y.square().sum().backward()
    assert float(w13.grad.norm()) > 0


@pytest.mark.parametrize(
    ("compiler", "emulator"),
    [(("g++", "-march=native"), ()), (("aarch64-linux-gnu-g++", "-march=armv8-a", "-static"), ("qemu-aarch64",))],
    ids=["here", "NEON"],
)
def test_as_a_program_of_its_own(compiler, emulator, tmp_path):
    """On Arm's vectors too, where cross compiler and emulator are at hand (Debian: g++-aarch64-linux-gnu, qemu-user)."""
    missing = [name for name in (compiler[0], *emulator) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    program, source = tmp_path / "program", Path(__file__).with_name("against_loop.cpp")
    options = ("-O3", "-std=c++17", "-pthread", "-I", str(binding.HERE))
    subprocess.run([*compiler, *options, str(source), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[::2] == ["y", "dx", "dgates", "dw13", "dw2"]
