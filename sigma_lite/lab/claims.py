"""Claims of papers that disagree, measured: what lab/disagreements.py puts on its page.

Each function measures in seconds or reads a recorded result. Numbers of ours are computed, those of papers are quoted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.balance.dual import ascend, choose
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share, top1_load_balancing_loss
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.lab.results import read_results
from sigma_lite.lab.seeds import interval, paired
from sigma_lite.model import Routing
from sigma_lite.papers import adamoe, barbarians, latency, moge, shinka, simbal
from sigma_lite.scale.placement import waiting

RESULTS = Path(__file__).parents[2] / "results" / "lab"
INSIDE = RESULTS.parent / "bench" / "inside-family.json"
SIGMA_SCHEDULE = (8, 8, 6, 6, 4, 4, 2, 2)


class Entry(NamedTuple):
    title: str
    description: str  # the one
    against: str  # and the other
    found: str  # ours
    settled: str  # what follows


def _sure(ids: Sequence[int], E: int) -> Routing:
    """Tokens that give all probability to these experts."""
    ids_T1 = torch.tensor(ids)[:, None]
    logits = 1e4 * torch.nn.functional.one_hot(ids_T1[:, 0], E).float()
    probs = logits.softmax(-1)
    return Routing(probs, ids_T1, probs.gather(1, ids_T1), logits)


def _skewed(T: int, E: int) -> Tensor:
    """Sigmoid scores of experts that are not equally liked."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    return (logits + torch.randn(E, generator=generator, dtype=torch.float64)).sigmoid()


def _runs(experiment: str, arm: str) -> list[dict]:
    return [run for run in read_results(RESULTS / f"{experiment}-cpu.json")["runs"] if run["arm"] == arm]


def _inside_runs(arm: str) -> list[dict]:
    return [run for run in json.loads(INSIDE.read_bytes())["runs"] if run["arm"] == arm]


def _inside(part: str, name: str, arm: str) -> str:
    """Mean over layers, then over seeds, with its 95 % interval."""
    middle, half = interval([mean(run[part][name]) for run in _inside_runs(arm)])
    return f"{middle:.2f} ± {half:.2f}"


# ------------------------------------------------------------------------------------------------------------ entries


def blind_spot() -> Entry:
    E = 96
    one, flat = torch.eye(E)[0], torch.full((4, E), 1 / E)
    collapsed = load_balancing_loss(flat, torch.zeros(4, 1, dtype=torch.int64), one).item()
    sure = _sure([0] * 4, E)
    flat_f = load_balancing_loss(sure.probs, sure.ids, torch.full((E,), 1 / E)).item()
    lowest = [(run["heldout"]["lbl"][0], run["heldout"]["max"][0]) for run in _runs("fig2", "LBL, K = 1")]
    pairs = ", ".join(f"{lbl:.2f} at {100 * most:+.0f} %" for lbl, most in lowest)
    return Entry(
        "When is the balance loss least?",
        "Switch and GShard: where the loads f and the probabilities P are both even.",
        "Sigma-MoE-Tiny: either is enough, so the loss can say 1 while the loads are not even.",
        f"Flat P and all tokens at one of {E} experts: {collapsed:.2f}. Even f and all probability on one: {flat_f:.2f}."
        f" Trained, held-out text, layer 0, loss and busiest expert, three seeds: {pairs} (`fig2`).",
        "Settled for Sigma: the two are exact, and every recorded seed shows it.",
    )


def loss_free() -> Entry:
    def span(values: list[float]) -> str:
        return f"{min(values):+.0f} to {max(values):+.0f} %"

    def heldout(arm: str) -> str:
        runs = [run["heldout"] for run in _runs("fig3", arm)]
        first, worst = [100 * run["max"][0] for run in runs], [100 * max(run["max"]) for run in runs]
        dead = [sum(run["dead"]) for run in runs]
        return f"{span(first)}, {span(worst)}, {min(dead)} to {max(dead)} experts"

    def middle(arm: str) -> str:
        return span([100 * run["middle"]["max"][0] for run in _runs("fig3", arm)])

    def last(arm: str) -> str:
        return span([100 * (np.max(run["last"]["f"]) * len(run["last"]["f"][0]) - 1) for run in _runs("fig3", arm)])

    usual, faster = "loss-free, K = 1 of 96", "loss-free, K = 1 of 96, rate 0.003"
    return Entry(
        "Does loss-free balance work?",
        "Wang et al.: yes, at 6 experts of 64, with a busiest expert 4 % above even over the validation set.",
        "Sigma-MoE-Tiny: at 1 of 96 the low layers collapse, a busiest expert nearly 40 times even.",
        "Held-out text at the end, three seeds (`fig3`): the busiest expert of layer 0, that of the least even layer, and"
        f" how many experts of all layers have no token. 6 of 64: {heldout('loss-free, K = 6 of 64')}. 1 of 96:"
        f" {heldout(usual)}; at the rate 0.003 {heldout(faster)}; with sharp routers"
        f" {heldout('loss-free, K = 1 of 96, sharp routers')}. The LBL at 1 of 96: {heldout('LBL, K = 1')}. Layer 0 in the"
        f" middle of training: the LBL {middle('LBL, K = 1')}, loss-free {middle(usual)}, at the rate 0.003"
        f" {middle(faster)}. The least even layer in the last window of training: loss-free {last(usual)}, at the rate 0.003"
        f" {last(faster)}.",
        "At 6 of 64 it works here too, in layer 0 best. At 1 of 96 layer 0 collapses in training and partly returns, and at"
        " the end a layer above it is far from even: on held-out text half as far as the report's, or as far, on training"
        " text, where the bias follows, less far. In how far a model's size matters, or a score that is a sigmoid (the"
        " released code applies the bias to no other), is not settled here.",
    )


def threshold() -> Entry:
    runs = [np.array(run["last"]["f"]) for run in _runs("family", "ShinkaEvolve's LBL")]
    L, E = runs[0].shape
    printed, listed = ([int((E * f < tau).sum()) for f in runs] for tau in (shinka.PRINTED, shinka.LISTING))
    values = ", ".join(f"{x / n:.2g}" for n in (64, 96) for x in (shinka.PRINTED, shinka.LISTING))
    return Entry(
        "ShinkaEvolve: below which share is an expert starved?",
        "The formula: tau = 0.064 / E.",
        "The listing of the same program: 0.64 / E.",
        f"Printed and listed for 64, then 96 experts: {values}. In the last window of three runs with the listing's value,"
        f" of {L * E} experts in all layers at most {max(printed)} are below the printed one and {min(listed)} to"
        f" {max(listed)} below the listed one (`family`). Its hinge acted in every step (`bench/inside-family`).",
        "The program is what was run, so the listing is our default. Which of the two the reported scores are of is not"
        " settled here.",
    )


def no_op() -> Entry:
    E, nulls, T = 24, 16, 512
    probs = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    ids = probs.topk(4).indices

    def spread(loss: Tensor) -> float:
        columns = torch.autograd.grad(loss, probs)[0].sum(0)[E - nulls :]
        return float((columns.max() - columns.min()) / columns.mean())

    averaged = spread(adamoe.null_load_balancing_loss(probs, ids.where(ids < E - nulls, -1), nulls))
    as_it_is = spread(load_balancing_loss(probs, ids))
    return Entry(
        "AdaMoE: are null experts balanced among each other?",
        "The paper, and `exp_1` of its code: no, each counts as used as often as their mean.",
        "`exp_2`: the mean is written to an empty slice, so yes.",
        f"Pull on {nulls} null columns of {E}, largest less smallest over the mean: {averaged:.2f} with the mean,"
        f" {as_it_is:.2f} without.",
        "Settled: in `exp_2` the averaging does nothing. What it costs is not settled here.",
    )


def ranks_unseen() -> Entry:
    chance = np.random.default_rng(0)
    windows = [chance.lognormal(0, 1, (8, 64)) for _ in range(3)]
    task = barbarians.Task(windows, ranks=8, spots=72, seconds=lambda *_: 1.0)
    programs = [barbarians.Program("greedy", pack) for pack in barbarians.PACK]
    spots = {f"{np.mean([barbarians.spot_balance(p, now) for p, now in task.plans(one)]):.3f}" for one in programs}
    ranks = [np.mean([1 / waiting(one(w, task.ranks, task.spots), w, task.ranks) for w in windows]) for one in programs]
    each = ", ".join(f"{name} {share:.2f}" for name, share in zip(barbarians.PACK, ranks, strict=True))
    return Entry(
        "Barbarians at the Gate: is it GPUs that are balanced?",
        "The article: tokens of each GPU.",
        "Its published evaluator: load of each copy of an expert; where the copies lie does not enter.",
        f"Three ways to pack the same copies, lognormal loads: the evaluator gives all {' and '.join(sorted(spots))}."
        f" Average over fullest rank, planned and measured on the same loads: {each}. An adaptation whose file of loads was"
        f" missing gave {barbarians.NO_DATA:.3f} to every program.",
        "Settled: packing is worth nothing to that score, though it is a step of the algorithm.",
    )


def a_quarter() -> Entry:
    net = ModelConfig.preset("sigma_moe_tiny")
    first = net.ledger(SIGMA_SCHEDULE + (1,) * (net.n_layers - len(SIGMA_SCHEDULE))).active
    last = net.ledger((1,) * net.n_layers).active
    return Entry(
        "Sigma-MoE-Tiny: how much is saved by the switch to one expert?",
        "The project page: 0.15 B, about 25 % of the active parameters.",
        "Its own shapes, layer by layer.",
        f"{first / 1e9:.3f} B before and {last / 1e9:.3f} B after: {(first - last) / 1e9:.3f} B,"
        f" {100 * (1 - last / first):.1f} %.",
        "Settled by counting: the page subtracts numbers that it had rounded.",
    )


def groups() -> Entry:
    net = ModelConfig(n_experts=64, top_k=8)
    scores = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    grouped = moge.imbalance_score(moge.Grouped(net, groups=8).choose(scores), 64, 8)
    usual = moge.imbalance_score(scores.topk(8).indices, 64, 8)
    try:
        moge.Grouped(ModelConfig(n_experts=64, top_k=1), groups=8)
        refused = "accepted"
    except ConfigError:
        refused = "refused"
    return Entry(
        "MoGE and top-1: can one have both?",
        "Pangu Pro MoE: the same number of experts from each of M groups, so no device waits.",
        "Sigma-MoE-Tiny: one expert for each token.",
        f"16 tokens, 8 of 64 experts, 8 devices: imbalance score {grouped:.2f} grouped, {usual:.2f} as usual. K = 1 and"
        f" M = 8 is {refused}: K must be a multiple of M.",
        "Settled: they exclude each other, but for M = 1, which groups nothing. The released code's learned scale of each"
        " expert, which the paper does not have, begins at 1; what it is worth is not settled here.",
    )


def micro_or_global() -> Entry:
    E = 8
    halves = [_sure([e for e in range(first, first + E // 2)] * 8, E) for first in (0, E // 2)]
    whole = _sure(sum(([*range(first, first + E // 2)] * 8 for first in (0, E // 2)), []), E)
    pooled = load_share(sum(expert_counts(half.ids, E) for half in halves))
    top1 = mean(top1_load_balancing_loss(half.logits, half.ids).item() for half in halves)
    top1_whole = top1_load_balancing_loss(whole.logits, whole.ids).item()
    lbl = mean(GlobalLBL().loss(half, pooled).item() for half in halves)
    return Entry(
        "Sigma-MoE-Tiny: balanced over which tokens?",
        "Its LBL: loads are summed over all data-parallel ranks, though not over accumulated micro-batches.",
        "The code of its Top-1 LBL: each micro-batch of each rank for itself.",
        f"Two micro-batches, each even over its own half of {E} experts, so that together all are even. LBL with shared"
        f" loads: {lbl:.2f}. Top-1 LBL of each, mean: {top1:.2f}; of both as one: {top1_whole:.2f}.",
        "Settled: on batches of one domain the two ask for different things. Which the report's figure used is not settled"
        " here, nor what it changes.",
    )


def monotone() -> Entry:
    gamma = _skewed(960, 96)
    rises = {}
    for name, rule, rate in (("sign steps of 0.01", "sign", 1e-2), ("proportional steps of 0.001", "proportional", 1e-3)):
        found = ascend(gamma, 1, 400, rule, rate)
        rises[name] = 100 * (found.dual.diff() > 1e-9).double().mean().item()
    each = ", ".join(f"{name} {share:.0f} %" for name, share in rises.items())
    return Entry(
        "Dual view of loss-free balance: does every step improve?",
        "Han & Zhong, first versions: the Lagrangian improves monotonically.",
        "The third version: under a condition.",
        f"Fixed scores, 960 tokens, 96 experts, 400 steps; steps after which the dual was higher: {each}.",
        "Settled: not every step. The condition (new loads have not, on balance, crossed the mean) is proved in"
        " `balance/dual.py`, and tests find no step that keeps it and rises.",
    )


def k_or_one() -> Entry:
    E, K, T = 8, 2, 8
    ids = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], 1)
    probs = torch.full((T, E), 1 / E)
    ours = load_balancing_loss(probs, ids).item()
    summed = E * float((expert_counts(ids, E) / T * probs.mean(0)).sum())
    return Entry(
        "What is the loss of a balanced layer?",
        "Pangu, Demons in the Detail, DeepSeek-V3: 1; their f counts E / K times.",
        "ShinkaEvolve's listing and code in the form of Hugging Face's: slots are summed over the tokens.",
        f"Balanced, K = {K}: {ours:.2f} here, {summed:.2f} with summed slots.",
        "Settled: K. A coefficient taken from one to the other is wrong by K.",
    )


def sign_of_error() -> Entry:
    gamma, T, E = _skewed(960, 96), 960, 96
    right = ascend(gamma, 1, 300, "sign", 1e-2).imbalance
    price = torch.zeros(E, dtype=torch.float64)
    for _ in range(300):
        price = price - 1e-2 * (T / E - choose(gamma, price, 1).loads).sign()
    wrong = choose(gamma, price, 1).loads
    return Entry(
        "Loss-free balance: which way does the bias move?",
        "A summary of Wang et al.: the error is own load less the mean, and the bias follows its sign.",
        "Megatron's code: mean less own load.",
        f"960 fixed tokens, 96 experts, largest distance from 10 tokens: {right[0]:.0f} at first; after 300 steps of 0.01"
        f" {right[-1]:.0f} by Megatron's sign, and {(wrong - T / E).abs().max():.0f} by the other, with {(wrong == 0).sum()}"
        " experts without a token.",
        "Settled: mean less own load. The other one lets the poor starve.",
    )


def importance() -> Entry:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def pull(value: Tensor) -> float:
        return float(torch.autograd.grad(value, logits, allow_unused=False)[0].abs().max())

    cost = torch.arange(1.0, 9.0)
    released = pull(latency.cv_squared(cost * latency.importance_of_chosen(logits, 1)))
    ours = pull(latency.cv_squared(cost * logits.softmax(-1).sum(0)))
    return Entry(
        "ShiftAddViT: is it trained with its latency loss?",
        "The paper: importance and load, weighted by latency.",
        "The released code: another gate is used in training, and the balance loss is set to 0. At one expert per token its"
        " importance is a softmax over a single logit.",
        f"Largest gradient of the importance term at K = 1: {released:.1f} as released, {ours:.4f} over all experts.",
        "Settled: that term cannot train anything at K = 1. What the released models were trained with is not settled here.",
    )


def similar_rows() -> Entry:
    E, d = 96, 64
    rows = torch.nn.Parameter(0.1 * torch.randn(E, d, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([rows], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        simbal.row_similarity(rows).backward()
        optimizer.step()
    reached, bound = simbal.row_similarity(rows).item(), (E - d) ** 0.5 / E
    square = simbal.row_similarity(torch.eye(d)).item()
    return Entry(
        "SimBal: can rows be orthogonal?",
        "SimBal: yes, so loads need not be counted.",
        f"A router of {E} experts and width {d}: no, {E} rows cannot be orthogonal in {d} dimensions.",
        f"At {d} experts {square:.2f} can be reached. At {E} no router is below {bound:.3f}; 300 steps of Adam end at"
        f" {reached:.2f}, where rows of zero score 1.",
        "Settled: with more experts than width its minimum says nothing about orthogonality.",
    )


def rows_of_routers() -> Entry:
    sizes = [_inside("rows", "size", arm) for arm in ("frozen router", "LBL, K = 1", "nothing")]
    loads = [_inside("rows", "by_nearest", arm) for arm in ("LBL, K = 1", "nothing")]
    return Entry(
        "Does a balance loss make a router's rows similar, and do similar rows make uneven experts?",
        "The paper of the online K-means router (read second hand): an auxiliary loss makes rows about three times as"
        " similar.",
        "Without any loss, at one expert of 96, rows become all but parallel.",
        "Mean size of the cosine of two rows of a layer, three seeds with 95 % intervals (`bench/inside-family`): random"
        f" rows that never move {sizes[0]}, LBL {sizes[1]}, no loss {sizes[2]}. Rank correlation of an expert's load with"
        f" its row's largest cosine to another: LBL {loads[0]}, no loss {loads[1]}.",
        "More similar than random rows by about as much as was reported, and far less than without a loss: what one"
        " compares with decides, and what the paper compared is not known here. Under the LBL similarity explains next to"
        " nothing of who has which load.",
    )


def sure_or_even() -> Entry:
    arms = "mutual information", "LBL, K = 1"
    entropies = [f"{_inside('entropy', 'mean', arm)} and {_inside('entropy', 'token', arm)}" for arm in arms]
    idle = [[int(sum(run["entropy"]["dead"])) for run in _inside_runs(arm)] for arm in arms]
    loss = paired(read_results(RESULTS / "family-cpu.json"), *arms)
    return Entry(
        "ModuleFormer: are modules used evenly?",
        "The paper: its loss, the mutual information of token and module, spreads tokens over all modules and makes each"
        " sure of its own.",
        "The loss itself: a difference of two entropies, so that what surer tokens gain may be paid with fewer modules.",
        "Entropy of the mean routing and mean entropy of a token's, nats, mean over layers, held-out text, three seeds with"
        f" 95 % intervals (`bench/inside-family`; log 96 = {np.log(96):.2f}): {entropies[0]}; LBL {entropies[1]}. Experts"
        f" without a held-out token: {min(idle[0])} to {max(idle[0])} of {6 * 96}; LBL {max(idle[1])}. Bits per byte against"
        f" the LBL: {loss}.",
        "At one expert per token tokens become sure, and the mean does not stay even; the model is none the worse for it.",
    )
