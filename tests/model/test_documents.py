"""Attention inside documents: blocks and varlen equal the table of who may look at whom, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Parts, Transformer, documents
from sigma_lite.model.attention import Attention, attend, attention_mask
from sigma_lite.model.documents import attention_way, document_lengths, grouped, pieces, varlen

B, S = 2, 700
NET = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_experts": 4}
CPU = torch.device("cpu")


def lengths_of(kind: str) -> list[list[int]]:
    """Lengths of the documents of each row."""
    draw = random.Random(kind)
    if kind == "all of length 1":
        return [[1] * S, [1] * S]
    if kind == "one of length S":
        return [[S], [S]]
    if kind == "1, 2, 3 ...":
        rising = [n for n in range(1, 37)]
        return [[*rising, S - sum(rising)], [S - sum(rising), *reversed(rising)]]
    if kind == "as long as a piece, and around it":
        return [[documents.PIECE, documents.PIECE + 1, S - 2 * documents.PIECE - 1], [documents.PIECE - 1, 1, S - 256]]
    rows = []
    for _ in range(B):
        cuts = sorted(draw.sample(range(1, S), draw.choice([1, 5, 40])))
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, S], strict=True)])
    return rows


KINDS = ("all of length 1", "one of length S", "1, 2, 3 ...", "as long as a piece, and around it", "any", "any other")


def numbered(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def flash_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa):
    """What torch's documentation says of varlen_attn, by a loop over documents: the GPU kernel cannot be run here."""
    assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k) and window_size == (-1, 0)
    assert longest_q == longest_k >= starts_q.diff().max() and (starts_q[0], starts_q[-1]) == (0, len(q))
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = []
    for a, b in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhc,khc->hqk", q[a:b], k[a:b]) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), -torch.inf)
        out.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v[a:b]))
    return torch.cat(out)


def with_gradients(ways, dtype, heads=4, groups=2):
    """[out, dq, dk, dv] of each way of saying who may look at whom, for one incoming gradient."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, S, 16, dtype=dtype) for h in (heads, groups, groups))
    dout = torch.randn(B, heads, S, 16, dtype=dtype)
    for allowed in ways:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*inputs, allowed)
        yield [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_mask_forward_and_backward(kind, groups):
    docs = numbered(lengths_of(kind))
    ways = attention_mask(S, S, docs, CPU), pieces(docs)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        masked, blocks = with_gradients(ways, dtype, groups=groups)
        for ours, reference in zip(blocks, masked, strict=True):
            size = max(1.0, reference.abs().max())  # documents of one position give queries and keys no gradient at all
            assert (ours - reference).abs().max() <= bound * size


@pytest.mark.parametrize("kind", KINDS[2:])
def test_varlen_is_told_the_same_documents(kind, monkeypatch):
    """The kernel's own arithmetic needs a GPU; here a loop that does what its documentation says stands in its place."""
    monkeypatch.setattr(documents, "varlen_attn", flash_varlen)
    docs = numbered(lengths_of(kind))
    masked, ours = with_gradients((attention_mask(S, S, docs, CPU), varlen(docs)), torch.float64)
    for one, reference in zip(ours, masked, strict=True):
        assert (one - reference).abs().max() <= 1e-13 * reference.abs().max()


@pytest.mark.skipif(documents.varlen_attn is None, reason="this torch has no varlen attention")
def test_torchs_varlen_takes_what_we_give_it():
    """Shapes, arguments and their types on a GPU that is not there: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, h, 64, 32, dtype=torch.bfloat16, device="cuda") for h in (4, 2, 2))
        starts_N = torch.empty(6, dtype=torch.int32, device="cuda")
        out = attend(q, k, v, documents.Varlen(starts_N, 64))
    assert out.shape == q.shape and out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_hold_whole_documents_and_are_few(kind):
    """Law: T positions, tables of at most T * PIECE entries, and no more pieces than twice what they would fill, and one."""
    rows = lengths_of(kind)
    cut, flat = pieces(numbered(rows)), [n for row in rows for n in row]
    assert document_lengths(numbered(rows)).tolist() == flat
    assert sum(cut.sizes) == B * S and len(cut.sizes) <= 2 * B * S / documents.PIECE + 1
    assert sum(mask.numel() for mask in cut.masks if mask is not None) <= B * S * documents.PIECE
    assert [n for group in grouped(flat) for n in group] == flat
    for group, mask in zip(grouped(flat), cut.masks, strict=True):
        assert (mask is None) == (len(group) == 1) and (len(group) == 1 or sum(group) <= documents.PIECE)


def test_a_model_computes_the_same_in_both_ways_and_learns_the_same():
    docs, ids = numbered(lengths_of("any")), torch.randint(64, (B, S))
    grads = []
    for way in ("masked", "blocks"):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**NET, attention=way)).double()
        loss, _ = model.loss(ids, ids.roll(-1, 1), documents_BS=docs)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_what_runs_is_chosen_by_length_device_and_numbers():
    """All recorded runs have rows of at most 1,024 tokens on a CPU: there the table stays, and with it their sums."""
    net, half = ModelConfig(), torch.bfloat16
    assert [attention_way(net, n, CPU, torch.float32)[0] for n in (256, 1024, 1025, 4096)] == ["masked"] * 2 + ["blocks"] * 2
    assert net.attention_way(256, gpu=True, half=True) == "varlen" and net.attention_way(4096, True, False) == "blocks"
    assert ModelConfig(head_dim=36).attention_way(256, True, True) == "masked", "flash attention wants multiples of 8"
    assert attention_way(ModelConfig(attention="blocks"), 8, CPU, half) == ("blocks", "asked for by net.attention")
    with pytest.raises(ConfigError, match="net.attention=varlen cannot run here: flash attention needs a CUDA GPU"):
        attention_way(ModelConfig(attention="varlen"), 8, CPU, half)
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        ModelConfig(attention="block")


def test_default_rows_are_computed_as_before(monkeypatch):
    """Bitwise: what the recorded runs did at their lengths was torch's attention with a table for the whole row."""
    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k) or original(*a, **k))
    docs, ids = numbered([[100, 156], [256]]), torch.randint(64, (2, 256))
    Transformer(ModelConfig(**NET)).loss(ids, ids, documents_BS=docs)
    assert len(seen) == NET["n_layers"]
    assert all(torch.equal(k["attn_mask"][:, 0], attention_mask(256, 256, docs, CPU)) for k in seen)


def test_an_attention_of_ones_own_is_given_the_mask():
    seen = []

    class Mine(Attention):
        def forward(self, x_BSD, rotation, mask_BSS=None, cache=None):
            seen.append(mask_BSS)
            return super().forward(x_BSD, rotation, mask_BSS, cache)

    docs, ids = numbered([[5, 7], [12]]), torch.randint(64, (2, 12))
    Transformer(ModelConfig(**NET, attention="blocks"), Parts(attention=Mine)).loss(ids, ids, documents_BS=docs)
    assert all(torch.equal(mask, attention_mask(12, 12, docs, CPU)) for mask in seen) and seen


def test_a_document_that_comes_back_is_refused_where_only_a_mask_could_say_it():
    docs, ids = torch.tensor([[0, 0, 1, 1, 0, 0]]), torch.randint(64, (1, 6))
    Transformer(ModelConfig(**NET)).loss(ids, ids, documents_BS=docs)
    with pytest.raises(ValueError, match="attention=masked"):
        Transformer(ModelConfig(**NET, attention="blocks")).loss(ids, ids, documents_BS=docs)
