"""The experiments, by name. An arm that several of them need is written once and trained once."""

from __future__ import annotations

import dataclasses

from sigma_lite.config import nearest, require
from sigma_lite.lab.experiment import Arm, DenseWidth, Experiment, Patch, RowShare, Share, WholeSaves
from sigma_lite.lab.family import PAPERS, PROTOCOL
from sigma_lite.runfile import overlay

NEVER = 10**9  # a switch step beyond the end of any run
HEAD = [8, 8, 4, 2]  # experts per token in the low layers before the switch, one in all others: about the report's shape
DENSE_STEPS = 1.25  # of the dense twin in the time of one of the toy's steps on one core: benchmarks/step_times.py
SWITCHES = (0.5, 0.7, 0.9)  # shares of the run; when the report switches is UNKNOWN


def balance(**settings: object) -> Patch:
    return {"model": {"balance": settings}}


def net(**settings: object) -> Patch:
    return {"model": {"net": settings}}


def sparsity(switch_step: int | Share, head: list[int] = HEAD) -> Patch:
    return {"model": {"sparsity": {"head": head, "switch_step": switch_step}}}


# ---------------------------------------------------------------------------------------------------------- the arms

TOP1 = Arm("LBL, K = 1", "the conventional loss at target sparsity from the start")
LOW8 = Arm(
    "LBL, K = 8 low",
    f"{HEAD} experts per token in the low layers, one in the others, to the end",
    {**sparsity(NEVER), "save": {"milestones": [Share(share) for share in SWITCHES]}},
)
MILD_HEAD = [3, 2]
LOW3 = Arm(
    "K = 3 low",
    f"{MILD_HEAD}: giving it up costs a third of the active experts, as in the report; giving up {HEAD} three quarters",
    {**sparsity(NEVER, MILD_HEAD), "save": {"milestones": [Share(0.7)]}},
)
LOSS_FREE = Arm(
    "loss-free, K = 1 of 96",
    "no balance loss; a bias on sigmoid scores, moved by 0.001 a step against the load",
    {"model": {"net": {"router_score": "sigmoid"}, "balance": {"loss": "none", "bias": "sign"}}},
)
LOSS_FREE_FAST = Arm(
    "loss-free, K = 1 of 96, rate 0.003",
    "three times the rate: this run has fewer steps than the report's collapse takes",
    {"model": {"net": {"router_score": "sigmoid"}, "balance": {"loss": "none", "bias": "sign", "bias_rate": 3e-3}}},
)
SHARP = {  # scores come near 0 and 1; elsewhere the spread stops at the widest gap that a fair share of tokens has
    "net": {"router_score": "sigmoid"},
    "balance": {"loss": "none", "bias": "sign", "z_weight": 0.0},
    "optim": {"router_lr": 10.0},
}
LOSS_FREE_SHARP = Arm(
    "loss-free, K = 1 of 96, sharp routers",
    "no z-loss, and routers that learn ten times as fast: only scores near 0 and 1 let a spread come to 1",
    {"model": SHARP},
)
LOSS_FREE_SHARP_FAST = Arm(
    "loss-free, K = 1 of 96, sharp routers, rate 0.003",
    "a spread cannot grow beyond 1 and two rates: here 1.006",
    overlay({"model": SHARP}, balance(bias_rate=3e-3)),
)
LOSS_FREE_6_OF_64 = Arm(
    "loss-free, K = 6 of 64",
    "the same rule at the sparsity for which it was made",
    {
        "model": {
            "net": {"router_score": "sigmoid", "n_experts": 64, "top_k": 6},
            "balance": {"loss": "none", "bias": "sign"},
        }
    },
)


def top1_lbl(temperature: float) -> Arm:
    description = "the loss whose denominator closes the blind spot; a small temperature comes close to counting winners"
    return Arm(f"Top-1 LBL, temperature {temperature:g}", description, balance(loss="top1", temperature=temperature))


def converted(share: float, parent: Arm = LOW8, head: list[int] = HEAD) -> Arm:
    description = f"the checkpoint of {parent.name!r} at that share of the run, switched to one expert per token everywhere"
    name = f"converted at {share:.0%}" + ("" if parent is LOW8 else f", from {parent.name}")
    return Arm(name, description, sparsity(Share(share), head), branch=(parent.name, share))


def one_seed(arm: Arm) -> Arm:
    return dataclasses.replace(arm, seeds=(0,))


MICRO = Arm(
    "micro LBL",
    "each of a step's four micro-batches balanced for itself",
    {**balance(loss="micro"), "data": {"rows": {"per_micro": RowShare(1 / 4)}}},
)
SEQUENCE = Arm("sequence LBL", "each row balanced for itself (DeepSeek-V3)", balance(loss="sequence"))
PROPORTIONAL = Arm(
    "loss-free, proportional",
    "softmax scores; the bias moves in proportion to what is missing",
    balance(loss="none", bias="proportional"),
)
LOUD = Arm(
    "LBL, experts 96 times larger at first",
    "as much of the stream as under a gate of 1: a control for hash routing",
    net(expert_gain=96.0),
)
NOTHING = Arm("nothing", "no balance loss, no bias", balance(loss="none"))
SHINKA = Arm(
    "ShinkaEvolve's LBL",
    "LBL and a penalty on flat routers while some expert starves",
    {"model": {"custom_balance": {"class_path": "sigma_lite.papers.shinka.Shinka"}}},
)
MUTUAL = Arm(
    "mutual information",
    "ModuleFormer: experts used equally, each token sure of its own",
    {"model": {"custom_balance": {"class_path": "sigma_lite.papers.moduleformer.MutualInformation"}}},
)


def scale_free(temperature: float, switch: Patch | None = None) -> Arm:
    """Our own loss (balance/scale_free.py)."""
    own = {"class_path": "sigma_lite.balance.scale_free.ScaleFreeLBL", "init_args": {"temperature": temperature}}
    patch = {"model": {"custom_balance": own, **(switch or {}).get("model", {})}}  # type: ignore[attr-defined]
    name = f"scale-free LBL, temperature {temperature:g}" + (", K = 8 low until 70%" if switch else "")
    return Arm(name, "LBL on logits in units of their own spread: shrinking them changes nothing", patch)


def through_spread(temperature: float) -> Arm:
    """The same with a gradient that is orthogonal to the logits."""
    arm, more = scale_free(temperature), {"model": {"custom_balance": {"init_args": {"through_spread": True}}}}
    description = "the gradient knows of the spread too, so that no step asks in vain for smaller logits"
    return Arm(f"{arm.name}, through the spread", description, overlay(dict(arm.patch), more))


def slow_router(factor: float, arm: Arm = TOP1) -> Arm:
    """The arm with a smaller learning rate for the routers only: does their own step overshoot?"""
    patch = overlay(dict(arm.patch), {"model": {"optim": {"router_lr": factor}}})
    name = f"router rate x {factor:g}" + ("" if arm is TOP1 else f", {arm.name}")
    return Arm(name, "loads answer a router's step many times over, most of all in layer 0", patch, seeds=(0,))


def without_attention(arm: Arm, name: str) -> Arm:
    """The arm with layer 0's attention taken away: its router sees the token and nothing else."""
    patch = overlay(dict(arm.patch), net(attention_from_layer=1))
    return Arm(name, "no attention before layer 0's router, which so sees the token alone", patch, seeds=(0,))


def vocabulary(size: int) -> Arm:
    """Another tokenizer: the most frequent token's share changes, and with it the floor."""
    patch = {"model": {"net": {"vocab_size": size}}, "data": {"corpus": {"dir": f"data/lab-{size}"}}}
    return Arm(f"vocabulary {size}", f"the conventional loss at K = 1, {size} tokens", patch, seeds=(0,))


def split_frequent(arm: Arm, name: str) -> Arm:
    """The arm with its frequent tokens split until each fills at most half an expert: no lump is left to be balanced."""
    patch = overlay(dict(arm.patch), {"data": {"rows": {"split_above": 1 / 192}}})
    return Arm(name, "tokens of more than 0.5 % of the text enter under several ids", patch, seeds=(0,))


# `balance.zipf.k_list` of the lumps that "LBL, K = 1" shows at the cpu scale, with LOW8's budget of 24 experts a token
BY_LUMPS = [5, 5, 4, 4, 3, 3]
K_BY_LUMPS = Arm(
    "K by lumps", f"{BY_LUMPS} experts per token: as many in all as the K = 8 arm", sparsity(NEVER, BY_LUMPS), seeds=(0,)
)


def k_everywhere(K: int) -> Arm:
    return Arm(f"K = {K} of 96", f"{K} of 96 experts per token in every layer", net(top_k=K), seeds=(0,))


NO_SCHEDULE = {"head": [], "switch_step": 0}


def dense(name: str, description: str, width: DenseWidth, more: Patch = {}) -> Arm:  # noqa: B006  read only
    """The scale's model with one SwiGLU a layer in place of its router and experts."""
    model = {
        "net": {"n_experts": 1, "d_expert": width, "top_k": 1},
        "sparsity": NO_SCHEDULE,
        "balance": {"loss": "none", "z_weight": 0.0},
    }
    return Arm(name, description, {"model": model, **more})


MIXTURE = Arm("mixture", "the scale's own model and schedule")
WORTH = (
    MIXTURE,
    Arm(
        "mixture, K = 1 throughout",
        "no schedule: one expert per token from the first step",
        {"model": {"sparsity": NO_SCHEDULE}},
    ),
    dense(
        "dense, same active size", "as many active parameters as the mixture at its end, same tokens", DenseWidth("active")
    ),
    dense("dense, same work", "as many training FLOPs as the mixture, same tokens", DenseWidth("work")),
    dense(
        "dense, same time",
        f"of the same active size, trained {DENSE_STEPS:.2f} times as many steps: as long as the mixture takes on one core",
        DenseWidth("active"),
        {"trainer": {"max_steps": WholeSaves(DENSE_STEPS)}},
    ),
)

HASHED = next(arm for arm in PAPERS if arm.name == "hash routing")
LENGTH = (
    *(arm for arm in WORTH if arm.name != "dense, same time"),  # how long that is was measured for the toy
    dataclasses.replace(HASHED, patch=overlay(dict(HASHED.patch), {"model": {"sparsity": NO_SCHEDULE}})),
)

DOMAINS = {"source": "domains", "dir": "data/lab-domains", "dataset": None, "subset": None}  # also at scales that read hf


def on_domains(name: str, description: str, micros: int, **model: object) -> Arm:
    """Stretches of a quarter of a step's rows, each of one domain: the same rows in the same steps for every arm."""
    rows = {"per_micro": RowShare(1 / micros), "domain_run": RowShare(1 / 4)}
    return Arm(name, description, {"model": model, "data": {"corpus": DOMAINS, "rows": rows}})


OTHER_CORPUS = Arm("four domains", "the same vocabulary size on another corpus", {"data": {"corpus": DOMAINS}}, seeds=(0,))

# --------------------------------------------------------------------------------------------------- the experiments

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "fig2",
            "Is a router balanced when its balance loss says so?",
            (TOP1, LOW8),
            ("layer0_deviation", "load_and_probability", "final_table"),
        ),
        Experiment(
            "fig3",
            "Why does loss-free balancing fail at one expert of 96 when it works at 6 of 64?",
            (TOP1, LOSS_FREE, LOSS_FREE_FAST, LOSS_FREE_SHARP, LOSS_FREE_SHARP_FAST, LOSS_FREE_6_OF_64),
            ("layer0_deviation", "bias_spread", "final_table"),
        ),
        Experiment(
            "fig4",
            "Does a loss without the blind spot balance the lowest layer, and at what cost?",
            (TOP1, top1_lbl(1.0), one_seed(top1_lbl(0.3)), top1_lbl(0.1)),
            ("layer0_deviation", "loss_against_balance", "final_table"),
        ),
        Experiment(
            "table3",
            "What does it cost to convert a model to its target sparsity late in training?",
            (TOP1, LOW8, *(converted(share) for share in SWITCHES), LOW3, converted(0.7, LOW3, MILD_HEAD)),
            ("learning_curves", "layer0_deviation", "final_table"),
        ),
        Experiment(
            "worth",
            "Is a mixture better than a dense model, at equal active size, work or time?",
            WORTH,
            ("bits_against", "final_table"),
        ),
        Experiment(
            "length",
            "Do experts pay, does learned routing, and does layer 0 stay uneven when training is long?",
            LENGTH,
            ("bits_against", "layer0_deviation", "deviation_by_layer", "final_table"),
        ),
        Experiment(
            "global",
            "Over which tokens should the load be counted when a micro-batch holds one domain?",
            (
                on_domains("micro", "f over a micro-batch of one domain", 4, balance={"loss": "micro"}),
                on_domains("buffer", "f over the micro-batches of the step so far", 4),
                on_domains("global", "f over the whole step, as with one rank a domain", 1),
                on_domains(
                    "shuffle",
                    "f over as few tokens as a micro-batch has, drawn from the whole step",
                    1,
                    custom_balance={"class_path": "sigma_lite.balance.shuffled.ShuffledLBL", "init_args": {"share": 0.25}},
                ),
            ),
            ("domain_expert_map", "loss_against_balance", "final_table"),
            measure="domains",
        ),
        Experiment(
            "balancers",
            "Every balancer under the same budget",
            tuple(
                map(
                    one_seed,
                    (TOP1, MICRO, SEQUENCE, top1_lbl(0.1), LOSS_FREE, PROPORTIONAL, SHINKA, MUTUAL, NOTHING),
                )
            ),
            ("loss_against_balance", "final_table"),
        ),
        Experiment(
            "sparsity",
            "From how many experts on, and at how many per token, does the conventional loss stop working?",
            (
                *(Arm(f"E = {E}", f"one of {E} experts per token", net(n_experts=E), seeds=(0,)) for E in (8, 32, 256)),
                one_seed(TOP1),
                *(k_everywhere(K) for K in (2, 4, 8)),
            ),
            ("deviation_by_sparsity", "final_table"),
        ),
        Experiment(
            "layer0",
            "What limits balance in the lowest layer: is it that token frequencies are Zipfian?",
            (
                one_seed(TOP1),
                one_seed(LOW8),
                k_everywhere(2),
                k_everywhere(4),
                vocabulary(512),
                vocabulary(8192),
                OTHER_CORPUS,
                without_attention(TOP1, "no attention, K = 1"),
                without_attention(vocabulary(512), "no attention, vocabulary 512"),
                without_attention(k_everywhere(4), "no attention, K = 4"),
                split_frequent(TOP1, "frequent tokens split"),
                split_frequent(without_attention(TOP1, ""), "no attention, frequent tokens split"),
                K_BY_LUMPS,
            ),
            ("predicted_and_measured", "lumps_and_load", "information_by_layer", "deviation_by_layer", "final_table"),
            measure="layers",
        ),
        Experiment(
            "better",
            "Can layer 0 be balanced at K = 1 without losing to the conventional loss?",
            (
                TOP1,
                one_seed(LOW8),
                top1_lbl(0.1),
                slow_router(0.3),
                slow_router(0.1),
                slow_router(0.1, top1_lbl(0.1)),
                slow_router(0.1, scale_free(0.3)),
                scale_free(0.3),
                through_spread(0.3),
                one_seed(scale_free(0.1)),
                one_seed(scale_free(0.3, sparsity(Share(0.7)))),
            ),
            ("loss_against_balance", "layer0_deviation", "final_table"),
        ),
        Experiment(
            "family",
            "Every router and balancer on the same tokens: which differences are more than noise?",
            (
                TOP1,
                NOTHING,
                MICRO,
                SEQUENCE,
                top1_lbl(0.1),
                LOSS_FREE,
                PROPORTIONAL,
                SHINKA,
                MUTUAL,
                scale_free(0.3),
                dataclasses.replace(k_everywhere(4), seeds=None),  # beside which a paper that needs K > 1 is fair
                LOUD,
                *PAPERS,
            ),
            ("deviation_by_layer",),
            measure="family",
            protocol=PROTOCOL,
        ),
    )
}


def experiment(name: str) -> Experiment:
    """An experiment by name. Raises ConfigError naming the nearest."""
    require(name in EXPERIMENTS, f"experiment {name!r} does not exist; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
