"""What one step of decoding has to read, and when guessing several tokens at once pays. No torch: plain numbers.

At small batches a model that writes text waits for its memory: each step reads every weight that it uses once, however few
tokens use it. A dense model reads the same for 1 token and for 32; an ultra-sparse one reads another expert for almost
every token, because t tokens at K of E experts touch

    N(t) = E (1 - (1 - K / E)^t)

of them if they choose independently and evenly. So batching and speculative decoding, which live on reading a weight once
for many tokens, bring little until N(t) is near E.
"""

from __future__ import annotations

from typing import NamedTuple

from sigma_lite.config import ModelConfig, require


def distinct_experts(E: int, K: int, tokens: float) -> float:
    """N(t), 0..E: experts of one layer that `tokens` tokens touch; neighbours in a text choose alike, and touch fewer."""
    require(1 <= K <= E, f"K={K} of E={E} experts: K must lie in 1..E")
    return E * (1 - (1 - K / E) ** tokens)


class Reads(NamedTuple):
    """Parameters that one step of decoding reads."""

    shared: float  # attention, routers, norms and the head: once, for any number of tokens
    experts: float

    @property
    def all(self) -> float:
        return self.shared + self.experts


def reads(net: ModelConfig, tokens: int = 1) -> Reads:
    """Of one step that is given `tokens` tokens: a batch of sequences, or several positions of one that are checked."""
    counts = net.ledger()
    expert = counts.experts / (net.n_layers * net.n_experts)
    shared = counts.attention + counts.router + counts.norms + net.vocab_size * net.d_model
    return Reads(shared, net.n_layers * distinct_experts(net.n_experts, net.top_k, tokens) * expert)


def tokens_per_second(
    net: ModelConfig,
    memory_gbps: float,
    *,
    batch: int = 1,
    weight_bytes: int = 2,
    hit_rate: float = 1.0,
    link_gbps: float = 0.0,
    hidden: bool = True,
) -> float:
    """The roofline of decoding: nobody is faster; caches, attention's keys and launches come on top.

    Args:
        memory_gbps: GB/s between the device and its memory.
        batch: sequences that are written together.
        hit_rate: share of asked experts that are in memory; the others come over a link of `link_gbps` GB/s.
        hidden: whether they come while something is computed (the larger of both times counts) or before (their sum).
    """
    require(0 <= hit_rate <= 1, f"hit_rate={hit_rate}: is a share, 0..1")
    require(hit_rate == 1 or link_gbps > 0, "experts that are not in memory come over a link: give link_gbps")
    found = reads(net, batch)
    memory = found.all * weight_bytes / (memory_gbps * 1e9)
    link = (1 - hit_rate) * found.experts * weight_bytes / (link_gbps * 1e9) if hit_rate < 1 else 0.0
    return batch / (max(memory, link) if hidden else memory + link)


# ------------------------------------------------------------------------------------------------------- speculation


def tokens_of_a_round(acceptance: float, drafted: int) -> float:
    """Tokens that one check of `drafted` tokens brings: those before the first wrong one, and one of the model itself.

    Args:
        acceptance: chance that a drafted token is the model's, given that those before it were (2211.17192, section 3).
    """
    require(0 <= acceptance <= 1, f"acceptance={acceptance}: is a chance, 0..1")
    return float(sum(acceptance**n for n in range(drafted + 1)))


def speculative_gain(net: ModelConfig, acceptance: float, drafted: int, draft_reads: float = 0.0) -> float:
    """How many times as many tokens per weight read as without a draft; below 1 it does not pay.

    A round reads what `drafted + 1` positions touch, and the draft model's `draft_reads` parameters `drafted` times.
    """
    round_reads = reads(net, drafted + 1).all + drafted * draft_reads
    return tokens_of_a_round(acceptance, drafted) * reads(net).all / round_reads


def share_to_accept(net: ModelConfig, drafted: int, draft_reads: float = 0.0) -> float:
    """Share of drafted tokens that must be right for a draft to pay: above 1, it cannot.

    For few tokens N(t) is nearly t, and this is the experts' share of what one token reads, plus the draft's cost.
    """
    alone = reads(net).all
    return ((reads(net, drafted + 1).all - alone) / drafted + draft_reads) / alone
