"""bf16-mixed keeps every router and every balance loss in fp32: the same bits under autocast and without it."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path

import pytest
import torch
from samples import NET
from torch import Tensor, nn

from sigma_lite import balance, papers
from sigma_lite.balance.balancer import Balancer, FromFunction, WithBias
from sigma_lite.balance.losses import expert_counts, load_share, z_loss
from sigma_lite.model import Parts, Router, Routing, Transformer
from sigma_lite.papers.astrea import Kinds
from sigma_lite.papers.moduleformer import GrownRouter, HeadExperts, StickBreaking
from sigma_lite.papers.simbal import WithRows, row_similarity

T, D, E = 40, NET.d_model, NET.n_experts
bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def classes(*, of: type) -> list[type]:
    """Those of papers/ and balance/, so that a paper of tomorrow is asked too."""
    found = {}
    for room in (papers, balance):
        for file in sorted(Path(room.__file__).parent.glob("[!_]*.py")):
            module = importlib.import_module(f"{room.__name__}.{file.stem}")
            own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
            found |= {one.__qualname__: one for one in own if issubclass(one, of)}
    return list(found.values())


def same(one: Routing, other: Routing) -> bool:
    return one.logits.dtype == torch.float32 and all(map(torch.equal, one, other))


def begun(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.5)
    return module


@pytest.mark.parametrize("kind", [Router, *classes(of=Router)], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_decides_alike_under_autocast(kind, dtype):
    router = begun(kind(NET, **({"old": 3} if kind is GrownRouter else {})))
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = (x_TD, torch.arange(T)) if router.reads_tokens else (x_TD,)
    plain = copy.deepcopy(router)(*inputs)  # one may learn from what it sees
    with bf16():
        mixed = router(*inputs)
    assert same(plain, mixed)


def test_heads_are_chosen_alike_under_autocast():
    """Of 4,000 tokens some had another head with logits of 16 bits; so the test can fail."""
    heads = begun(HeadExperts(NET, chosen=1))
    x_BSD = torch.randn(4, 1000, D, generator=torch.Generator().manual_seed(1))
    gates_BSH = heads.gates(x_BSD)
    with bf16():
        assert torch.equal(heads.gates(x_BSD), gates_BSH) and gates_BSH.dtype == torch.float32
        rounded_BSH = heads.router(x_BSD)
    assert (rounded_BSH.argmax(-1) != gates_BSH.argmax(-1)).any()


def test_the_routing_of_heads_and_of_kinds_is_in_fp32():
    x_BSD, ids_BS = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(1)), torch.arange(24).view(2, 12)
    heads, kinds = begun(HeadExperts(NET, chosen=1)), begun(Kinds(D, 24)).eval()
    for routed in (lambda: heads(x_BSD, None)[1], lambda: kinds(x_BSD, ids_BS)[1]):
        plain = routed()
        with bf16():
            assert same(plain, routed())


def test_in_a_model_the_attention_that_chooses_follows_autocast_elsewhere():
    model, ids = Transformer(NET, Parts(attention=functools.partial(StickBreaking, chosen=1))), torch.arange(12)[None]
    with bf16():
        assert model(ids).logits.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------- losses


def routings(kind: type[Router]) -> list[Routing]:
    router = begun(kind(NET))
    return [router(torch.randn(T, D, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]


@pytest.mark.parametrize(
    "kind", [one for one in classes(of=Balancer) if one not in (FromFunction, WithBias)], ids=lambda kind: kind.__name__
)
def test_a_balance_loss_is_the_same_under_autocast(kind):
    found = routings(WithRows)
    f_LE = torch.stack([load_share(expert_counts(r.ids, E)) for r in found])
    plain_L = kind().losses(found, f_LE, 2)
    with bf16():
        mixed_L = kind().losses(found, f_LE, 2)
        z = z_loss(found[0].logits)
    assert mixed_L.dtype == torch.float32 and torch.equal(plain_L, mixed_L) and torch.equal(z, z_loss(found[0].logits))


def test_orthonormal_rows_cost_nothing_under_autocast():
    """96 rows of 128 numbers: 0.0156 with products of 16 bits, where fp32 leaves 2.5e-6."""
    rows_ED = nn.init.orthogonal_(torch.empty(96, 128), generator=torch.Generator().manual_seed(0))
    with bf16():
        assert row_similarity(rows_ED).item() < 1e-5
        assert ((rows_ED @ rows_ED.T).float() - torch.eye(96)).abs().sum() / 96 > 0.01


def test_a_routing_of_some_tokens_keeps_the_rows():
    """Rewards leave tokens out: SimBal then met a routing without rows."""

    def some(x: Tensor) -> Tensor:
        return x[:3]

    (routing, _) = routings(WithRows)
    for fewer in (routing.each(some), routing.each(Tensor.detach)):
        assert torch.equal(fewer.rows_ED, routing.rows_ED) and type(fewer) is type(routing)
