"""Every backend equals the float64 loop: values and gradients, for kind and unkind routings."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sigma_lite.kernels import choose_backend, explain_backend, grouped_swiglu
from sigma_lite.kernels.padded import expert_capacity, grouped_swiglu_padded, has_room
from sigma_lite.kernels.torch_grouped import _backward_op, _forward_op

E, D, F = 12, 24, 8  # D is not 2F, so that a shape taken for another shows
HERE = ["loop", "naive", "padded", "grouped"]  # on any machine; those that need a GPU have files of their own
FAST = [name for name in HERE if name != "loop"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def routing(kind: str, T: int, K: int) -> torch.Tensor:
    if kind == "balanced":
        return (torch.arange(T)[:, None] + torch.arange(K)) % E
    if kind == "one expert":
        return torch.arange(K).expand(T, K).clone()
    weights = torch.ones(E) if kind == "multinomial" else 1 / torch.arange(1, E + 1)
    return torch.multinomial(weights, T * E, replacement=True).view(T, E).double().add(torch.rand(T, E)).topk(K).indices


def problem(T: int, K: int, kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    ids = routing(kind, T, K)
    tensors = (torch.randn(T, D), torch.rand(T, K), torch.randn(E, 2 * F, D) / D**0.5, torch.randn(E, D, F) / F**0.5)
    return ids, [t.to(dtype).requires_grad_() for t in tensors]


def run(ids, tensors, backend, weight):
    x, gates, w13, w2 = tensors
    y = grouped_swiglu(x, ids, gates, w13, w2, backend=backend)
    return [y, *torch.autograd.grad((y * weight).sum(), tensors)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["balanced", "multinomial", "zipf", "one expert"])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 3), (65, 1), (65, 3), (64, 12)])
def test_backend_equals_float64_loop(backend, dtype, kind, T, K):
    ids, tensors = problem(T, K, kind, dtype)
    weight = torch.randn(T, D).to(dtype)
    exact = run(ids, [t.detach().double().requires_grad_() for t in tensors], "loop", weight.double())
    ours = run(ids, tensors, backend, weight)
    for name, a, b in zip(("y", "dx", "dgate", "dw13", "dw2"), ours, exact, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", HERE)
def test_no_tokens(backend):
    ids, tensors = problem(0, 1, "balanced", torch.float32)
    y, dx, _, dw13, dw2 = run(ids, tensors, backend, torch.zeros(0, D))
    assert y.shape == dx.shape == (0, D)
    assert dw13.abs().max() == dw2.abs().max() == 0


@pytest.mark.parametrize("backend", HERE)
def test_an_expert_without_tokens_gets_exactly_zero_gradient(backend):
    ids, tensors = problem(33, 1, "one expert", torch.float32)
    _, _, _, dw13, dw2 = run(ids, tensors, backend, torch.ones(33, D))
    assert dw13[1:].abs().max() == dw2[1:].abs().max() == 0
    assert dw13[0].abs().max() > 0 and dw2[0].abs().max() > 0


@pytest.mark.parametrize("backend", HERE)
def test_an_expanded_upstream_gradient_is_fine(backend):
    """`sum().backward()` hands down a gradient of stride 0, which grouped_mm by itself refuses."""
    ids, tensors = problem(8, 2, "multinomial", torch.float32)
    grouped_swiglu(tensors[0], ids, *tensors[1:], backend=backend).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in tensors)


def test_gradcheck_of_the_specification():
    ids, tensors = problem(5, 2, "multinomial", torch.float64)
    x, gates, w13, w2 = tensors
    assert torch.autograd.gradcheck(
        lambda *t: grouped_swiglu(t[0], ids, *t[1:], backend="loop"), (x, gates, w13, w2), fast_mode=True
    )


@pytest.mark.parametrize("backend", HERE)
def test_twice_the_same_input_gives_the_same_bits(backend):
    ids, tensors = problem(65, 3, "zipf", torch.float32)
    first, second = (run(ids, tensors, backend, torch.ones(65, D)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_compiled_in_one_graph_with_the_same_bits():
    ids, (x, *rest) = problem(33, 2, "zipf", torch.float32)
    compiled = torch.compile(grouped_swiglu, fullgraph=True, backend="aot_eager")  # a graph break would raise
    outputs = [f(x, ids, *rest, backend="grouped") for f in (grouped_swiglu, compiled)]
    gradients = [torch.autograd.grad(y.square().sum(), (x, *rest)) for y in outputs]
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_the_operators_describe_themselves():
    """Schema, shapes without data, and dynamic shapes, as torch checks them."""
    ids, (x, gates, w13, w2) = problem(9, 2, "multinomial", torch.float32)
    inputs = [t.detach() for t in (x, ids, gates, w13, w2)]
    torch.library.opcheck(_forward_op, inputs)
    _, x_ND, z_NF2, *plan = _forward_op(*inputs)
    torch.library.opcheck(_backward_op, (torch.randn(9, D), x_ND, z_NF2, *plan, *inputs[2:]))


def elements_of_weight_gradients(backend: str, n_experts: int) -> int:
    """How many elements of w13-shaped stacks one backward pass writes, by shape of every tensor that is made."""
    torch.manual_seed(0)
    x, ids, gates = torch.randn(64, D), torch.arange(64)[:, None] % n_experts, torch.ones(64, 1)
    w13, w2 = torch.randn(n_experts, 2 * F, D, requires_grad=True), torch.randn(n_experts, D, F)
    y = grouped_swiglu(x, ids, gates, w13, w2, backend=backend)
    with CountElements(w13.shape) as counted:
        y.sum().backward()
    return counted.elements


class CountElements(TorchDispatchMode):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.elements = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.elements += result.numel()
        return result


@pytest.mark.parametrize(("backend", "power"), [("naive", 2), ("loop", 1), ("grouped", 1), ("padded", 1)])
def test_gradient_traffic_grows_with_the_square_of_the_experts_only_where_slices_are_taken(backend, power):
    growth = elements_of_weight_gradients(backend, 32) / elements_of_weight_gradients(backend, 8)
    assert growth == pytest.approx(4**power, rel=0.1)


@pytest.mark.parametrize("capacity", [1, 5, 12, 65])
@pytest.mark.parametrize("K", [1, 3])
def test_dropping_a_slot_is_a_gate_of_zero(capacity, K):
    ids, (x, gates, w13, w2) = problem(65, K, "zipf", torch.float64)
    kept = has_room(ids, E, capacity)
    y = grouped_swiglu_padded(x, ids, gates, w13, w2, capacity)
    assert torch.allclose(y, grouped_swiglu(x, ids, gates * kept, w13, w2, backend="loop"), rtol=1e-12, atol=1e-14)
    fullest = torch.bincount(ids[kept], minlength=E)
    assert torch.equal(fullest, torch.bincount(ids.flatten(), minlength=E).clamp(max=capacity))


def test_room_is_given_in_token_order():
    ids = torch.tensor([[0], [1], [0], [0], [1]])
    assert has_room(ids, 2, 2).flatten().tolist() == [True, True, True, False, True]
    assert expert_capacity(len(ids), n_experts=2, factor=1.25) == 4


def test_the_chooser_says_why(monkeypatch):
    x, w13 = torch.zeros(3, 16), torch.zeros(4, 16, 16)
    assert choose_backend(x, w13)[0] == "grouped"
    assert explain_backend(x.double(), w13.double()) == "loop: float64, which grouped_mm refuses"
    assert "F=3 is not a multiple of 4" in explain_backend(x, torch.zeros(4, 6, 16))
    monkeypatch.setenv("SIGMA_LITE_BACKEND", "loop")
    assert explain_backend(x, w13) == "loop: asked for by SIGMA_LITE_BACKEND"


def test_wrong_input_is_named():
    ids, (x, gates, w13, w2) = problem(4, 1, "balanced", torch.float32)
    with pytest.raises(ValueError, match="backend 'magic' does not exist: choose auto, loop, naive, padded, grouped"):
        grouped_swiglu(x, ids, gates, w13, w2, backend="magic")
    with pytest.raises(ValueError, match=r"gates is \[4, 2\], expected the shape of ids \[4, 1\]"):
        grouped_swiglu(x, ids, torch.zeros(4, 2), w13, w2)
    with pytest.raises(ValueError, match="w2 is"):
        grouped_swiglu(x, ids, gates, w13, w2[:, :, :4])
    with pytest.raises(ValueError, match="'grouped' cannot run this: float64"):
        grouped_swiglu(x.double(), ids, gates.double(), w13.double(), w2.double(), backend="grouped")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_does_not_exist_is_refused_not_left_out(backend, wrong):
    x, w13, w2 = torch.randn(3, 16), torch.randn(4, 32, 16), torch.randn(4, 16, 16)
    with pytest.raises((IndexError, RuntimeError), match="ids must lie in 0..3|out of bounds"):
        grouped_swiglu(x, torch.tensor([[0], [wrong], [3]]), torch.ones(3, 1), w13, w2, backend=backend)


def test_auto_says_why_the_fastest_kernel_is_not_taken():
    reason = explain_backend(torch.empty(2, 24), torch.empty(4, 24, 24))
    assert reason.startswith("grouped:") and "where the cpu kernel cannot run (D=24 is not a multiple of 16" in reason
