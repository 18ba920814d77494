"""Laws of the model: where gradients reach, what attention may see, and that a cache changes nothing."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import KeyValueCache, Transformer
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.rotary import rotate, rotation
from sigma_lite.model.transformer import cross_entropy

SMALL = ModelConfig(
    vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=8, d_expert=16, router_init_std=0.2
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(SMALL)


def ids(B=2, S=12, seed=0):
    return torch.randint(0, SMALL.vocab_size, (B, S), generator=torch.Generator().manual_seed(seed))


def test_shapes_and_routing_facts(model):
    model.set_k((3, 1))
    out = model(ids())
    assert out.logits.shape == (2, 12, 64)
    for routing, K in zip(out.routings, (3, 1), strict=True):
        assert routing.probs.shape == routing.logits.shape == (24, 8)
        assert routing.ids.shape == routing.gates.shape == (24, K)
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(24))
        torch.testing.assert_close(routing.gates, routing.probs.gather(1, routing.ids))
        assert routing.probs.dtype == torch.float32


def test_router_gradient_from_the_language_model_alone_at_k_1(model):
    """The trap of top-1: softmax after top-k would make this exactly zero."""
    model.set_k((1, 1))
    loss, _ = model.loss(ids(), ids(seed=1))
    loss.backward()
    for block in model.blocks:
        assert block.moe.router.weight.grad.norm() > 1e-6


def test_gate_after_top_k_would_be_dead():
    """The same layer with the gate renormalised over its single winner: so the test above can fail."""
    from sigma_lite.kernels import grouped_swiglu

    torch.manual_seed(0)
    x, router = torch.randn(20, 8), torch.randn(4, 8, requires_grad=True)
    w13, w2 = torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    gradients = {}
    for order in ("before top-k", "after top-k"):
        gates, chosen = (x @ router.T).softmax(-1).topk(1)
        gates = gates if order == "before top-k" else gates / gates.sum(-1, keepdim=True)
        loss = grouped_swiglu(x, chosen, gates, w13, w2).square().mean()
        gradients[order] = torch.autograd.grad(loss, router)[0].norm()
    assert gradients["before top-k"] > 1e-3
    assert gradients["after top-k"] < 1e-6 * gradients["before top-k"]


def test_the_future_does_not_reach_the_past(model):
    a, b = ids(1), ids(1)
    b[0, 8:] = (b[0, 8:] + 1) % 64
    torch.testing.assert_close(model(a).logits[:, :8], model(b).logits[:, :8])
    assert (model(a).logits[:, 8:] - model(b).logits[:, 8:]).abs().max() > 1e-3


def test_attention_does_not_cross_documents(model):
    """Two documents in one row give what each gives alone: RoPE sees only distances, the mask only the own document."""
    first, second = ids(1, 5, seed=3), ids(1, 7, seed=4)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(torch.cat((first, second), 1), documents_BS=documents).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_cached_generation_equals_reading_everything(model):
    tokens, cache = ids(2, 10), [KeyValueCache() for _ in range(2)]
    pieces = [model(part, cache=cache).logits for part in tokens.split([4, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_loss_equals_cross_entropy_of_the_logits(model):
    inputs, targets = ids(), ids(seed=1)
    targets[0, 3:6] = -100
    expected = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(inputs, targets)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(inputs, targets)[0], expected)
        x = model.backbone(inputs)[0].flatten(0, 1)
        each = cross_entropy(x, model.head.weight, targets.flatten(), reduction="none")
        torch.testing.assert_close(each.sum() / (targets != -100).sum(), expected)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_loss_under_autocast_multiplies_in_16_bits_and_adds_in_fp32(dtype, most):
    """Half a unit in the last place is 2e-3 in bf16 and 2.4e-4 in fp16; the loss itself must not be rounded to 16 bits."""
    random = torch.Generator().manual_seed(0)
    x, head = torch.randn(1300, 64, generator=random), torch.randn(700, 64, generator=random) / 8
    targets = torch.randint(700, (1300,), generator=random)
    targets[::7] = -100

    def found(loss, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, head)]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(3 * value, leaves)]

    def mixed(x, head):
        with torch.autocast("cpu", dtype=dtype):
            return cross_entropy(x, head, targets)

    exact = found(lambda x, head: torch.nn.functional.cross_entropy(x @ head.T, targets), torch.float64)
    for ours, reference in zip(found(mixed, torch.float32), exact, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - reference).norm() / reference.norm() < most

    used = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.extend(t.dtype for t in args if "mm" in function.name() and isinstance(t, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Products():
        found(mixed, torch.float32)
    assert set(used) == {dtype}


def test_an_untrained_model_guesses_uniformly(model):
    loss, _ = model.loss(ids(8, 32), ids(8, 32, seed=1))
    assert loss.item() == pytest.approx(math.log(64), rel=0.02)


def test_one_expert_is_a_dense_model():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, n_experts=1))
    out = model(ids())
    assert all(bool((r.gates == 1).all()) for r in out.routings)


def test_weights_depend_on_seed_and_name_only():
    torch.manual_seed(7)
    torch.rand(3)
    a = Transformer(SMALL)
    torch.manual_seed(7)
    b = Transformer(dataclasses.replace(SMALL, n_layers=1, init_std=0.02))
    assert torch.equal(a.blocks[0].attention.query.weight, b.blocks[0].attention.query.weight)
    assert not torch.equal(a.blocks[0].moe.experts.w13[0], a.blocks[0].moe.experts.w13[1])
    torch.manual_seed(8)
    assert not torch.equal(a.embedding.weight, Transformer(SMALL).embedding.weight)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 2, 8)])
def test_norm_equals_torch(shape):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-6)
    with torch.no_grad():
        norm.weight.normal_()
    x, upstream = torch.randn(shape).requires_grad_(), torch.randn(shape)
    ours, theirs = norm(x), torch.nn.functional.rms_norm(x, shape[-1:], norm.weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight), upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_keeps_lengths_and_sees_only_distance():
    x, y = torch.randn(1, 6, 1, 8), torch.randn(1, 6, 1, 8)
    near, far = (rotation(torch.arange(start, start + 6), 8, 10_000.0) for start in (0, 100))
    torch.testing.assert_close(rotate(x, near).norm(dim=-1), x.norm(dim=-1))
    dots = [torch.einsum("bshc,bthc->st", rotate(x, r), rotate(y, r)) for r in (near, far)]
    torch.testing.assert_close(dots[0], dots[1], atol=1e-4, rtol=1e-4)


def test_k_can_change_and_nothing_else_does(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.set_k((4, 2))
    assert model.k_per_layer == (4, 2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match="must lie in 1..n_experts=8"):
        model.set_k((9, 1))
    assert model.k_per_layer == (4, 2)


def test_a_cache_knows_no_documents(model):
    """One new position would see all old ones, whatever document it is said to belong to."""
    cache = [KeyValueCache() for _ in range(2)]
    model(ids(), cache=cache, documents_BS=torch.zeros(2, 12, dtype=torch.int64))
    for S in (1, 3):
        with pytest.raises(ValueError, match=f"documents of {S} positions for {12 + S} keys"):
            model(ids(S=S), cache=[*map(copy.copy, cache)], documents_BS=torch.ones(2, S, dtype=torch.int64))
    with pytest.raises(ValueError, match="documents of 1 positions for 12 keys"):
        model(ids(), documents_BS=torch.zeros(2, 1, dtype=torch.int64))


def test_wrong_ids_are_named(model):
    with pytest.raises(ValueError, match=r"ids must be integers \[B, S\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32"):
        model(torch.zeros(1, 3))


def test_bf16_autocast_keeps_the_router_in_fp32(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids())
    assert out.logits.dtype == torch.bfloat16
    assert out.routings[0].logits.dtype == torch.float32


def test_a_target_that_does_not_exist_is_refused_in_16_bits_too():
    """It was scored as token 0."""
    x, head = torch.randn(4, 16, requires_grad=True), torch.randn(10, 16)
    for dtype_on in (False, True):
        for wrong in (-1, 10):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype_on), pytest.raises((IndexError, RuntimeError)):
                cross_entropy(x, head, torch.tensor([0, 1, wrong, -100]))


def test_a_cache_and_a_bias_of_another_shape_are_refused(model):
    """An empty cache was no cache, and a bias of one number a layer was added to every expert alike."""
    for caches in ([], [KeyValueCache()]):
        with pytest.raises(ValueError, match=rf"cache has {len(caches)} entries for 2 layers"):
            model(ids(), cache=caches)
    for shape in ((2,), (2, 1), (1, 8), (3, 8)):
        with pytest.raises(ValueError, match=r"expected \[L, E\] = \[2, 8\]"):
            model.set_bias(torch.zeros(shape))
