"""Every setting of a run, with its unit and its reason; derived sizes are properties, never keys.

The classes are frozen: a config that could be built is a config that can run, and it stays what it was. Nothing here
imports torch, so that `sigma-lite plan` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ConfigError(ValueError):
    """A setting that cannot work. The message names the rule, the value and the nearest fix."""


def require(rule: bool, message: str) -> None:
    if not rule:
        raise ConfigError(message)


def nearest(name: str, choices) -> str:
    """The end of an error message: the choice that was probably meant, or all of them."""
    close = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    names = sorted(map(str, choices))
    return "choose from " + ", ".join(map(repr, names) if any("," in name for name in names) else names)


def plain_path(given: str | os.PathLike[str], setting: str) -> str:
    """A path as the system takes it: ~ and $NAME are filled in. Every path of every setting goes through here.

    Raises ConfigError for what would silently become a folder of an odd name: an address, an unknown $NAME or ~NAME.
    """
    text = os.path.expanduser(os.path.expandvars(os.fspath(given)))
    require(bool(text.strip()), f"{setting} is empty: give a file or folder")
    require("\0" not in text, f"{setting}={text!r}: no path can hold a zero byte")
    scheme, address, _ = text.partition("://")
    require(
        not (address and scheme.isalnum() and len(scheme) > 1),
        f"{setting}={text!r} is an address: files are read and written on disks of this machine; copy or mount them first",
    )
    first = text.replace("\\", "/").split("/")[0]
    odd = first.startswith(("~", "$")) and not os.path.lexists(first)
    require(not odd, f"{setting}={text!r}: {first} stands for nothing here; write ./{first} if it is a name")
    return text


def require_finite(name: str, value: object) -> None:
    """ConfigError for NaN and infinity, also inside lists and groups: a comparison lets the one or the other pass."""
    if isinstance(value, float):
        require(math.isfinite(value), f"{name}={value}: must be a finite number")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            require_finite(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            require_finite(f"{name}[{place}]", inner)


def _all_finite(settings: object) -> None:
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        require_finite(field.name, getattr(settings, field.name))


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        lowest = "at least 1" if isinstance(value, int) else "greater than 0"
        require(value > 0, f"{name}={value}: must be {lowest}")


# ------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Ledger:
    """Where the parameters are. Counts of parameters, not bytes. `active` is what one token passes through."""

    embedding: int  # token embedding, and the output head when it is not tied
    attention: int
    router: int
    norms: int
    experts: int  # all experts of all layers
    active_experts: int  # the experts that one token uses, over all layers

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding

    @property
    def non_embedding(self) -> int:
        return self.attention + self.router + self.norms + self.experts

    @property
    def active(self) -> int:
        """Non-embedding parameters used per token: the count behind Sigma-MoE-Tiny's "0.5B activated"."""
        return self.attention + self.router + self.norms + self.active_experts


ATTENTION = ("auto", "masked", "blocks", "varlen")
MASKED_UP_TO = 1024  # tokens of a row: with `attention: auto` longer ones are cut into blocks
PIECE = 256  # tokens that short documents of a block fill together; a longer document is a piece of its own
ROPE_TYPES = ("default", "linear", "yarn")


class RopeScaling(NamedTuple):
    """See model/rotary.py."""

    kind: str  # linear | yarn
    factor: float
    original: int  # tokens of a row before the extension; yarn


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder whose every feed-forward layer is a mixture of experts (Sigma-MoE-Tiny, 2512.16248, section 2).

    `n_experts=1` is a dense model: the one expert gets every token with gate 1.
    """

    vocab_size: int = 4096  # tokens, special ones included
    n_layers: int = 4
    d_model: int = 128  # width of the residual stream
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # key/value heads, each shared by n_heads / n_kv_heads query heads (GQA)
    head_dim: int = 32  # width of one head; even, because RoPE turns pairs
    n_experts: int = 96  # per layer
    d_expert: int = 64  # hidden width of one SwiGLU expert
    top_k: int = 1  # experts per token at target sparsity; a schedule may begin with more (SparsityConfig)
    router_score: str = "softmax"  # softmax | sigmoid: what a gate is; loss-free balance was made for sigmoid
    renormalise: bool = False  # divide a token's gates by their sum, as Qwen3-MoE may with 8 experts; never at top_k=1
    attention_from_layer: int = 0  # layers below have none: their routers see the token alone (an ablation of the lab)
    tie_embeddings: bool = True  # output head = token embedding
    attention: str = "auto"  # auto | masked | blocks | varlen: how attention stays inside documents; see model/documents.py
    rope_theta: float = 10_000.0  # RoPE base: positions up to about this many tokens stay distinguishable
    rope_type: str = "default"  # default | linear | yarn: longer rows than those trained on, by slower angles
    rope_factor: float = 1.0  # linear, yarn: how many times longer; at least 1
    rope_original_length: int = 0  # yarn: tokens of the rows before that; 0 for the other types
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    init_std: float = 0.02  # standard deviation of the token embedding at initialisation
    router_init_std: float = 0.02  # of the router rows; logits then start with std router_init_std * sqrt(d_model)
    expert_gain: float = 1.0  # scale of the experts' output projection at initialisation: see model/experts.py

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive(self, "vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "n_experts")
        _positive(self, "d_expert", "top_k", "rope_theta", "norm_eps", "init_std", "router_init_std", "expert_gain")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}: each key/value head serves the"
            f" same number of query heads; try n_kv_heads={_nearest_divisor(self.n_heads, self.n_kv_heads)}",
        )
        self._check_rope()
        require(self.attention in ATTENTION, f"attention {self.attention!r}: {nearest(self.attention, ATTENTION)}")
        scores = ("softmax", "sigmoid")
        require(self.router_score in scores, f"router_score {self.router_score!r}: {nearest(self.router_score, scores)}")
        require(
            self.top_k > 1 or not self.renormalise,
            f"renormalise=True with top_k=1: {_DEAD_GATE}",
        )
        require(
            0 <= self.attention_from_layer <= self.n_layers,
            f"attention_from_layer={self.attention_from_layer}: must lie in 0..n_layers={self.n_layers}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs; try {self.head_dim + 1}")
        require(
            self.top_k <= self.n_experts,
            f"top_k={self.top_k} exceeds n_experts={self.n_experts}: a token cannot choose more experts than there are;"
            f" try top_k={self.n_experts}",
        )

    def _check_rope(self) -> None:
        kind, factor, original = self.rope_type, self.rope_factor, self.rope_original_length
        require(kind in ROPE_TYPES, f"rope_type {kind!r}: {nearest(kind, ROPE_TYPES)}")
        require(factor >= 1, f"rope_factor={factor}: how many times longer rows become, at least 1")
        used = kind != "default"
        require(used or factor == 1, f"rope_factor={factor} has no effect on rope_type=default: set linear or yarn, or 1")
        require(
            (original > 0) == (kind == "yarn"),
            f"rope_original_length={original} with rope_type={kind}: yarn needs the tokens of a row before the extension"
            " (such as 4096), the other types 0",
        )

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """How RoPE's angles are slowed down; None where they are not."""
        if self.rope_type == "default":
            return None
        return RopeScaling(self.rope_type, self.rope_factor, self.rope_original_length)

    def rope_parameters(self) -> dict[str, object]:
        """RoPE as transformers 5 names it in `config.json`, and 4.57 but for rope_theta in `rope_scaling`."""
        known: dict[str, object] = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        if self.rope_type != "default":
            known["factor"] = self.rope_factor
        if self.rope_type == "yarn":
            known["original_max_position_embeddings"] = self.rope_original_length
        return known

    def attention_way(self, length: int, gpu: bool, half: bool) -> str:
        """masked | blocks | varlen: what is computed for packed rows of `length` tokens; `half`: in 16-bit numbers.

        The lengths of all recorded runs are masked on a CPU: the other ways add up in another order.
        """
        if self.attention != "auto":
            return self.attention
        if gpu and half and self.head_dim % 8 == 0 and self.head_dim <= 256:
            return "varlen"
        return "masked" if length <= MASKED_UP_TO else "blocks"

    def ledger(self, k_per_layer: Sequence[int] | None = None) -> Ledger:
        """Count parameters; `k_per_layer` are the experts per token in each layer (default: `top_k` everywhere)."""
        k_per_layer = self.check_k(k_per_layer if k_per_layer is not None else (self.top_k,) * self.n_layers)
        query, key_value = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        expert = 3 * self.d_model * self.d_expert  # gate, up and down projection
        attention_layers = self.n_layers - self.attention_from_layer
        return Ledger(
            embedding=self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2),
            attention=attention_layers * 2 * self.d_model * (query + key_value),
            router=self.n_layers * self.d_model * self.n_experts,
            norms=attention_layers * (self.d_model + 2 * self.head_dim) + (self.n_layers + 1) * self.d_model,
            experts=self.n_layers * self.n_experts * expert,
            active_experts=sum(k_per_layer) * expert,
        )

    def check_k(self, k_per_layer: Sequence[int]) -> tuple[int, ...]:
        """The list as a tuple, or a ConfigError: one entry a layer, each from 1 to `n_experts`."""
        k_per_layer = tuple(k_per_layer)
        require(
            len(k_per_layer) == self.n_layers,
            f"k_per_layer has {len(k_per_layer)} entries for n_layers={self.n_layers}: give one number a layer",
        )
        for layer, k in enumerate(k_per_layer):
            require(
                1 <= k <= self.n_experts,
                f"k_per_layer[{layer}]={k}: experts per token must lie in 1..n_experts={self.n_experts}",
            )
            require(k > 1 or not self.renormalise, f"renormalise=True with k_per_layer[{layer}]=1: {_DEAD_GATE}")
        return k_per_layer

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """A shape by name: see PRESETS."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} does not exist; {nearest(name, PRESETS)}")
        return PRESETS[name]


_DEAD_GATE = "one gate divided by itself is 1, and the loss no longer reaches the router; set renormalise=False"


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


# The report gives shape and counts; head_dim 96 is the value at which they agree (0.537 B active, 19.36 B in all).
# UNKNOWN there, our choice here: the vocabulary (Qwen3's size, so that an existing tokenizer fits), tied embeddings and
# the RoPE base (the usual 10,000 of a 4k context).
PRESETS: dict[str, ModelConfig] = {
    "toy": ModelConfig(),
    "sigma_moe_tiny": ModelConfig(
        vocab_size=151_936,
        n_layers=56,
        d_model=1536,
        n_heads=16,
        n_kv_heads=4,
        head_dim=96,
        n_experts=96,
        d_expert=768,
    ),
}


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class SparsityConfig:
    """Progressive sparsification (Sigma-MoE-Tiny, section 3): low layers begin with more experts per token."""

    head: tuple[int, ...] = ()  # experts per token in the first layers before the switch; () = target from the start
    switch_step: int = 0  # optimizer steps; from this step on every layer uses top_k. With a head: 1 or more

    def __post_init__(self) -> None:
        _all_finite(self)
        require(self.switch_step >= 0, f"switch_step={self.switch_step}: must be 0 or more optimizer steps")
        for layer, k in enumerate(self.head):
            require(k >= 1, f"head[{layer}]={k}: a layer needs at least one expert per token")


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps routers balanced: losses, a bias on the choice of experts, or both.

    Each weight multiplies the term of every layer and the layers are summed, as in Megatron; 0 switches a term off.
    """

    loss: str = "global"  # global | micro | sequence | top1 | none: see balance/losses.py
    weight: float = 1e-2  # the report's coefficient is UNKNOWN; 1e-2 is the start that its code's help text names
    bias: str = "none"  # none | sign | proportional: loss-free balance, see balance/bias.py
    bias_rate: float = 1e-3  # u: what one step adds to a score's bias (2408.15664, DeepSeek-V3)
    bias_decay: str = "none"  # none | sqrt: with sqrt, u falls as 1 / sqrt(step + 1)
    bias_centre: bool = False  # keep the mean bias at 0; changes no choice
    z_weight: float = 1e-3  # router z-loss, keeps logits small; likewise the help text's start
    temperature: float = 1.0  # softmax temperature of the Top-1 loss
    window_tokens: int = 200_000  # tokens pooled before load statistics are recorded; a toy micro-batch is mostly noise

    def __post_init__(self) -> None:
        _all_finite(self)
        for name, choices in BALANCE_CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"balance {name} {value!r} does not exist; {nearest(value, choices)}")
        for name in ("weight", "z_weight"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be 0 or more")
        _positive(self, "temperature", "window_tokens", "bias_rate")


@dataclass(frozen=True)
class RewardConfig:
    """Reinforcement from rewards that a rule gives (GRPO, 2402.03300) instead of learning what the rows say.

    Rows are generated problems, one each (data.rows.packed=false), so rows.per_step is how many are asked in a step. The
    model draws answers of its own, at temperature 1; right ones earn 1, others 0. See train/reward.py.
    """

    answers: int = 0  # drawn to each problem: a group; 0 switches reinforcement off, from 2 on it is on
    max_new_tokens: int = 64  # of an answer; one that has not ended by then is wrong
    normalise: bool = True  # divide advantages by their group's standard deviation (GRPO); false: do not (Dr. GRPO)
    null: bool = False  # the null arm: rewards are shuffled inside each group, so that they say nothing of the answers
    seed: int = 0  # of the answers

    def __post_init__(self) -> None:
        _positive(self, "max_new_tokens")
        few = f"reward.answers={self.answers}: a group needs 2 answers or more to be compared; 0 switches rewards off"
        require(self.answers == 0 or self.answers >= 2, few)
        require(self.seed >= 0, f"reward.seed={self.seed}: must be 0 or more")


BALANCE_CHOICES = {
    "loss": ("global", "micro", "sequence", "top1", "none"),
    "bias": ("none", "sign", "proportional"),
    "bias_decay": ("none", "sqrt"),
}


OPTIMIZERS = {"adamw": "torch.optim.AdamW", "muon": "sigma_lite.train.muon.Muon"}
SCHEDULES = {name: f"sigma_lite.train.schedules.{name}" for name in ("wsd", "cosine", "linear")}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate. Steps are optimizer steps.

    `optimizer` and `schedule` are one of the names, or of your own: `{class_path: mine.Sgd, init_args: {momentum: 0.9}}`. An
    optimizer is called with parameter groups and lr, a schedule with (step, total_steps=..., optim=...): see train/optim.py.
    """

    lr: float = 3e-3  # peak learning rate
    router_lr: float = 1.0  # factor on lr for the routers, whose loads react far more to a step than the rest; 0: they stay
    optimizer: str | dict = "adamw"  # adamw | muon (attention and expert matrices orthogonalised, AdamW for the rest)
    schedule: str | dict = "wsd"  # wsd (warmup, stable, decay) | cosine | linear: factor on lr after the warmup
    warmup_steps: int = 100  # linear from 0
    decay_fraction: float = 0.3  # wsd: last share of the run, in which the rate falls linearly towards 0
    final_lr_ratio: float = 0.05  # of lr, where that fall stops; of every named schedule
    weight_decay: float = 0.1  # on attention and expert matrices only: each module of model/ says which of its weights decay
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-10  # of AdamW: an expert that sees 1/96 of the tokens has gradients far below its usual 1e-8

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive(self, "lr", "eps")
        require(self.router_lr >= 0, f"router_lr={self.router_lr}: must be 0 (routers stay as they are) or more")
        class_named(self.optimizer, "optim.optimizer", OPTIMIZERS)
        class_named(self.schedule, "optim.schedule", SCHEDULES)
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: must be 0 or more")
        for name in ("decay_fraction", "final_lr_ratio"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)}: must lie in 0..1")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay}: must be 0 or more")
        require(all(0 <= b < 1 for b in self.betas), f"betas={self.betas}: each must lie in [0, 1)")


def class_named(given: str | Mapping, where: str, names: Mapping[str, str]) -> tuple[str, dict]:
    """(path, init_args) of a class or function that a setting names, shortly or by its path.

    Raises: ConfigError for a short name that does not exist, naming the nearest, and for a group without class_path.
    """
    group = given if isinstance(given, Mapping) else {"class_path": given}
    for key in group:
        require(
            key in ("class_path", "init_args"), f"unknown key {where}.{key}; {nearest(key, ('class_path', 'init_args'))}"
        )
    path, args = group.get("class_path"), group.get("init_args") or {}
    require(isinstance(path, str), f"{where}={given!r}: give a name ({', '.join(names)}) or class_path, and init_args")
    require(isinstance(args, Mapping), f"{where}.init_args={args!r}: must be a group of keys")
    known = "." in path or path in names
    require(
        known, f"{where}={path!r} does not exist: give `class_path: MODULE.NAME` for your own, or {nearest(path, names)}"
    )
    return names.get(path, path), dict(args)


@dataclass(frozen=True)
class StartConfig:
    """What `fit` may begin from, besides nothing and the run's own newest checkpoint. One word at most.

    A run's folder that holds checkpoints goes on from those; `branch_from` and `init_from` say how it began.
    """

    extend: bool = False  # go on to a larger trainer.max_steps, from where the rates of both lengths part
    branch_from: str | None = None  # RUN or CHECKPOINT: weights, moments, step; settings may change, the model may not
    init_from: str | None = None  # RUN or CHECKPOINT: weights only, for a run that begins at step 0; the routers' bias too
    new_weights: str = "refuse"  # refuse | begin: with init_from, parameters that it lacks or has in another shape

    def __post_init__(self) -> None:
        choices = ("refuse", "begin")
        require(self.new_weights in choices, f"new_weights={self.new_weights!r}: {nearest(self.new_weights, choices)}")
        both = self.branch_from is not None and self.init_from is not None
        require(
            not both, "branch_from and init_from: give one; a branch keeps moments and step, init_from takes weights only"
        )
        for name in ("branch_from", "init_from"):
            if getattr(self, name) is not None:
                plain_path(getattr(self, name), name)


# -------------------------------------------------------------------------------------------------------------- data


CONVERSATIONS = ("tasks", "chat")
"""Sources of which only the assistant's words are trained on."""
TASKS = ("add", "sort", "reverse", "two_step")
TASK_NAME = re.compile(rf"({'|'.join(TASKS)})([1-9]\d?)")
TASKS_HELDOUT = 0.1  # share of the problems that are never to be trained on; `eval` asks those


@dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from and where its tokens are kept.

    Three sources are this Python's own library, without a download. `programs` leaves out generated tables, and files that
    share much of their text are held out or trained on together, so that the held-out score is for text that was not
    seen. `stdlib` is every file, split by file. `domains` is the library as code, prose, bytecode and tables
    (data/library.py). `packages` adds to its programs the Python of installed packages, without copies and generated files,
    a domain each (data/packages.py). With `files`, the first folder below `path` in which a document lies is its domain.

    Two sources are conversations: `tasks` (generated problems, data/tasks.py) and `chat` (lines of messages). A row holds
    whole ones, as many as fit, and only what the assistant says is a target (data/conversations.py).
    """

    source: str = "stdlib"  # programs | stdlib | domains | packages (installed here) | files | hf (hub) | tasks | chat
    dir: str = "data/stdlib"  # the prepared tokenizer and shards live here
    path: str | None = None  # files: a file, a folder or a glob of text, code or tables (data/tables.py); chat: of .jsonl
    dataset: str | None = None  # hf: name on the hub, or a local dataset script or folder
    subset: str | None = None  # hf: configuration name
    packages: tuple[str, ...] = ()  # packages: names of distributions, such as numpy; one that is not installed is left out
    package_bytes: int | None = None  # packages: most text of each of them, drawn by a hash of its files' names; null: all
    tasks: tuple[str, ...] = ()  # tasks: names with a number of digits, such as add2, sort5; they take turns
    worked: bool = True  # tasks: the steps stand before the answer, between <think> and </think> where these are reserved
    split: str = "train"  # hf
    text_field: str = "text"  # column that holds the text in jsonl, json, csv, parquet and hf
    missing_text: str = "refuse"  # refuse | empty: what a row without that column is; empty ones are left out and counted
    vocab_size: int = 4096  # of the byte-level BPE trained on the training documents; linked to the model's
    tokenizer: str | None = (
        None  # one that exists: tokenizer.json, its folder, reference, or a name on the hub; kept as it is
    )
    end_of_text: str | None = None  # its special token that ends a document; null: <|endoftext|>, </s> or what others use
    special_tokens: tuple[str, ...] = ()  # names to reserve besides <|endoftext|>, <|user|>, <|assistant|> and <|end|>
    single_digits: bool = False  # the BPE gives every digit a token of its own, so that numbers are read place by place
    heldout: float = 0.08  # share of documents kept for validation, chosen by a hash of the name
    max_documents: int | None = None  # stop after so many documents (streaming a large data set); domains: shared evenly;
    # tasks: so many are drawn, and the same one a second time is left out
    parts: int = 1  # slices that processes may prepare side by side; the tokens are the same whoever prepares them

    def __post_init__(self) -> None:
        _all_finite(self)
        sources = ("programs", "stdlib", "domains", "packages", "files", "hf", *CONVERSATIONS)
        require(self.source in sources, f"corpus source {self.source!r} does not exist; {nearest(self.source, sources)}")
        reads = self.source in ("files", "chat")
        require(not reads or bool(self.path), f"corpus source {self.source!r} needs path: a file, folder or glob")
        require(self.source != "hf" or bool(self.dataset), "corpus source 'hf' needs dataset: a name such as 'org/name'")
        require(self.source != "packages" or bool(self.packages), "corpus source 'packages' needs packages: a list of names")
        require(len({*self.packages}) == len(self.packages), f"packages={list(self.packages)}: name each of them once")
        owners = {"path": ("files", "chat"), "dataset": ("hf",), "subset": ("hf",), "tasks": ("tasks",)}
        owners |= {"packages": ("packages",), "package_bytes": ("packages",)}
        for name, whose in owners.items():
            value = getattr(self, name)
            require(
                not value or self.source in whose,
                f"{name}={value!r} would not be read: source {self.source!r} has none; set data.corpus.source={whose[0]}",
            )
        self._check_tasks()
        choices = ("refuse", "empty")
        require(self.missing_text in choices, f"missing_text {self.missing_text!r}: {nearest(self.missing_text, choices)}")
        self._expand_paths()
        self._check_tokenizer()
        require(0 < self.heldout < 1, f"heldout={self.heldout}: must lie strictly between 0 and 1; try 0.08")
        _positive(self, "parts")
        require(self.package_bytes is None or self.package_bytes > 0, "package_bytes must be 1 or more, or null for all")
        most = self.max_documents
        require(most is None or most > 1, "max_documents must be at least 2: one to hold out")
        require(most is None or self.parts <= most, f"parts={self.parts} is more than max_documents={most}: lower it")

    def _check_tasks(self) -> None:
        if self.source != "tasks":
            require(self.worked, f"worked=False would not be read: source {self.source!r} has no problems")
            return
        require(bool(self.tasks), f"corpus source 'tasks' needs tasks: a list of {', '.join(f'{t}2' for t in TASKS)}, ...")
        require(self.max_documents is not None, "corpus source 'tasks' has no end: set max_documents to so many problems")
        for name in self.tasks:
            known = TASK_NAME.fullmatch(name) is not None
            usual = [f"{task}2" for task in TASKS]
            require(known, f"tasks: {name!r}: {nearest(name, usual)}, with any number of digits from 1 to 99")
        require(
            self.heldout >= TASKS_HELDOUT,
            f"heldout={self.heldout} would train on problems that `eval` holds out: set it to {TASKS_HELDOUT} or more",
        )

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None:
            given = [name for name in ("special_tokens", "single_digits") if getattr(self, name)]
            fix = "leave it out, or leave tokenizer out to train one"
            require(not given, f"{' and '.join(given)}: tokenizer={self.tokenizer!r} is finished and stays as it is; {fix}")
            return
        names, least = self.special_tokens, 260 + len(self.special_tokens)
        require(len({*names, ""}) == len(names) + 1, f"special_tokens={list(names)}: give different names, none empty")
        require(
            self.vocab_size >= least,
            f"vocab_size={self.vocab_size}: byte-level BPE needs 256 bytes and {least - 256} special tokens; try"
            f" {least + 252}",
        )

    def _expand_paths(self) -> None:
        hub = {name for name in ("dataset", "tokenizer") if not (getattr(self, name) or "").startswith(("~", "$"))}
        for name in {"dir", "path", "dataset", "tokenizer"} - hub:  # what may be a name on the hub stays as it is
            if getattr(self, name) is None:
                continue
            object.__setattr__(self, name, plain_path(getattr(self, name), f"data.corpus.{name}"))


@dataclass(frozen=True)
class MixtureConfig:
    """Several weighted sources of rows instead of the one corpus. A row is of one source, so shares of rows are of tokens.

    A source is a group of `data.corpus` keys that say where its text comes from. All share the tokenizer of data.corpus,
    or one trained on a sample in which each source has its share, and `heldout`, `text_field`, `missing_text`, `split` and
    `parts` where a source does not say its own. Tokens are kept in DIR/NAME, with DIR the `dir` of data.corpus. Held-out
    text is of all sources, and measured together and for each.
    """

    sources: dict[str, dict] = dataclasses.field(default_factory=dict)  # {web: {source: hf, dataset: ...}, code: {...}}
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # of each source; shares are weights over their sum
    temperature: float = 1.0  # without weights: shares ~ training tokens ** (1 / temperature); 1 by size, 100 nearly even
    stages: tuple[dict, ...] = ()  # [{at_step: 800, weights: {...}}]: from that step on (annealing); or a temperature

    def __post_init__(self) -> None:
        _all_finite(self)
        require(self.temperature > 0, f"mixture.temperature={self.temperature}: must be greater than 0")
        given = [name for name in ("weights", "stages") if getattr(self, name)]
        require(bool(self.sources) or not given, f"mixture.{'/'.join(given)} without mixture.sources: name those first")
        for name in self.sources:
            plain = bool(name.strip()) and not name.startswith(".") and not {*name} & {*"/\\:*?<>|"}
            require(plain, f"mixture.sources.{name!r}: it names a folder too; use letters, digits, - and _")
        self._check_weights(self.weights, "mixture.weights")
        for place, stage in enumerate(self.stages):
            self._check_stage(stage, f"mixture.stages[{place}]")
        steps = [stage["at_step"] for stage in self.stages]
        require(steps == sorted({*steps}), f"mixture.stages begin at steps {steps}: each must come after the one before")

    def _check_stage(self, stage: Mapping, where: str) -> None:
        known = ("at_step", "weights", "temperature")
        for key in stage:
            require(key in known, f"unknown key {where}.{key}; {nearest(key, known)}")
        step = stage.get("at_step")
        require(type(step) is int and step > 0, f"{where}.at_step={step}: give the step that it begins with, from 1")
        one = ("weights" in stage) != ("temperature" in stage)
        require(one, f"{where}: give either weights or a temperature")
        weights, temperature = stage.get("weights", {}), stage.get("temperature", 1.0)
        require(isinstance(weights, Mapping), f"{where}.weights={weights!r}: must be a group of keys")
        require("weights" not in stage or bool(weights), f"{where}.weights is empty: give each source's")
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature > 0
        require(number, f"{where}.temperature={temperature!r}: must be a number greater than 0")
        self._check_weights(weights, f"{where}.weights")

    def _check_weights(self, weights: Mapping, where: str) -> None:
        for name, weight in weights.items():
            require(name in self.sources, f"{where}.{name} is no source; {nearest(name, self.sources)}")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            require(number and weight >= 0, f"{where}.{name}={weight!r}: must be a number, 0 or more")
        missing = [name for name in self.sources if weights and name not in weights]
        require(not missing, f"{where} says nothing of {', '.join(missing)}: give 0 for a source that is not to be read")
        require(not weights or sum(weights.values()) > 0, f"{where} are all 0: nothing would be read")

    def shares(self, tokens: Mapping[str, int]) -> list[tuple[int, tuple[float, ...]]]:
        """(first step, share of each source) of all stages, the sources in their order; shares add up to 1.

        Args:
            tokens: training tokens of each source, which the temperature looks at.
        """
        found, largest = [], max(tokens.values(), default=1)
        for stage in ({"at_step": 0, "weights": self.weights, "temperature": self.temperature}, *self.stages):
            power = 1 / stage.get("temperature", 1.0)
            # twelve digits, which are the same on every machine: rows and a resume depend on them
            by_size = {name: float(f"{(tokens[name] / largest) ** power:.12g}") for name in self.sources}
            weights = stage.get("weights") or by_size
            total = sum(weights.values())
            found.append((stage["at_step"], tuple(weights[name] / total for name in self.sources)))
        return found


@dataclass(frozen=True)
class RowsConfig:
    """How tokens become batches. A row is `length` consecutive tokens; attention does not cross documents inside it."""

    length: int = 256  # tokens in a row
    per_step: int = 32  # rows per optimizer step, over all ranks and accumulation
    per_micro: int = 32  # rows per forward pass and rank; accumulation = per_step / (per_micro * ranks)
    seed: int = 0  # of the order
    domain_run: int = 1  # rows in a stretch of one domain; with n * per_micro, each micro-batch holds a single domain
    split_above: float = 1.0  # inputs: tokens with a larger share of the text get several ids; 1 = none (data/copies.py)
    ramp: tuple[tuple[int, int], ...] = ()  # [[0, 4], [200, 8]]: rows per step from a step on; ends with per_step
    packed: bool = True  # conversations: as many to a row as fit; false: one to a training row, as rewards need

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive(self, "length", "per_step", "per_micro", "domain_run", "split_above")
        require(self.split_above <= 1, f"split_above={self.split_above}: is a share of the text, at most 1; 1 splits none")
        require(self.seed >= 0, f"rows.seed={self.seed}: must be 0 or more")
        object.__setattr__(self, "ramp", tuple(tuple(entry) for entry in self.ramp))  # yaml has lists
        self._check_ramp()
        self.accumulation(1)
        for rows in self.sizes:
            require(
                rows % self.domain_run == 0,
                f"domain_run={self.domain_run} rows do not divide {self.named(rows)}: a step must hold whole stretches;"
                f" try domain_run={_nearest_divisor(rows, self.domain_run)}",
            )

    def _check_ramp(self) -> None:
        if not self.ramp:
            return
        shown = [list(entry) for entry in self.ramp]
        pairs = all(len(entry) == 2 and all(type(n) is int for n in entry) for entry in self.ramp)
        require(pairs, f"rows.ramp={shown}: give pairs of whole numbers, [step, rows per step from it on]")
        steps, rows = zip(*self.ramp, strict=True)
        require(steps[0] == 0, f"rows.ramp={shown} begins at step {steps[0]}: its first step must be 0")
        for name, values in (("steps", steps), ("rows", rows)):
            require(list(values) == sorted({*values}), f"rows.ramp={shown}: {name} must grow from pair to pair")
        require(rows[0] > 0, f"rows.ramp={shown}: a step needs at least one row")
        require(
            rows[-1] == self.per_step,
            f"rows.ramp ends with {rows[-1]} rows a step, and per_step={self.per_step}: set per_step to {rows[-1]}, the size"
            " that the ramp leads to",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows per step that occur, smallest first."""
        return tuple(rows for _, rows in self.ramp) or (self.per_step,)

    def at(self, step: int) -> int:
        """Rows of an optimizer step, counted from 0."""
        return next((rows for first, rows in reversed(self.ramp) if first <= step), self.per_step)

    def before(self, step: int) -> int:
        """Rows of all the optimizer steps before this one."""
        pieces = itertools.pairwise([*(self.ramp or ((0, self.per_step),)), (step, 0)])
        return sum(rows * max(0, min(end, step) - first) for (first, rows), (end, _) in pieces)

    def named(self, rows: int) -> str:
        """What the settings call so many rows per step."""
        return f"per_step={rows}" if rows == self.per_step else f"rows.ramp's {rows}"

    def accumulation(self, ranks: int, step: int | None = None) -> int:
        """Micro-batches per optimizer step at this number of ranks, by default behind the ramp.

        Raises: ConfigError where any size of the ramp does not divide, so that it is known before the first step.
        """
        together = self.per_micro * ranks
        for rows in self.sizes:
            up = -(-rows // together) * together
            require(
                rows % together == 0,
                f"{self.named(rows)} rows do not divide into {ranks} rank(s) x per_micro={self.per_micro};"
                f" try {f'{up}, or a smaller per_micro' if self.ramp else f'per_step={up}'}",
            )
        return (self.per_step if step is None else self.at(step)) // together


def check_mixture(corpus: CorpusConfig, rows: RowsConfig, mixture: MixtureConfig) -> None:
    """ConfigError for what a run with several sources cannot have."""
    if not mixture.sources:
        return
    usual = CorpusConfig()
    for name in OF_ONE_SOURCE:
        value = getattr(corpus, name)
        require(
            value == getattr(usual, name),
            f"data.corpus.{name}={value!r} would not be read: there are data.mixture.sources; say it for each of them",
        )
    require(rows.domain_run == 1, f"rows.domain_run={rows.domain_run}: is of one corpus, not of a mixture; set it to 1")
    require(rows.split_above == 1, f"rows.split_above={rows.split_above}: is of one corpus, not of a mixture; set it to 1")


def check_reward(
    reward: RewardConfig,
    balance: BalanceConfig,
    corpora: Mapping[str, CorpusConfig],
    rows: RowsConfig,
    weights: Mapping,
    own: bool = False,
) -> None:
    """ConfigError for a stage of rewards that could not ask, or would learn something else.

    Args:
        corpora: settings of each source; a source without a weight is read.
        own: whether a balancer of the reader's own stands in the place of what `balance` names.
    """
    if not reward.answers:
        return
    asks = f"model.reward.answers={reward.answers}"
    require(not rows.packed, f"{asks} asks one problem a row: set data.rows.packed=false")
    for name, corpus in corpora.items():
        asked = corpus.source == "tasks" or weights.get(name, 1) == 0
        which = f"source {name!r} of data.mixture is" if name else "data.corpus.source is"
        fix = "set its weight to 0 to measure it only" if name else "set tasks"
        require(asked, f"{asks}: {which} {corpus.source!r}, and only answers to generated problems can be judged: {fix}")
    require(own or balance.loss != "sequence", f"{asks}: balance.loss=sequence {OF_ROWS}")


OF_ROWS = "is a mean over rows, and how many answers a micro-batch learns from is for rewards to say: choose global"
"""What a balance loss of rows lacks beside rewards."""


OF_ONE_SOURCE = ("source", "packages", "package_bytes", "path", "dataset", "subset", "tasks", "worked", "max_documents")
OF_ALL_SOURCES = ("tokenizer", "end_of_text", "special_tokens", "single_digits", "vocab_size")
"""Keys of data.corpus that each source of a mixture has for itself, and those that all must share. The rest is inherited."""


def check_threads(given: object) -> None:
    fine = given in (None, "auto") or (type(given) is int and given > 0)
    require(fine, f"threads={given!r}: give a number of threads, auto, or null for what OMP_NUM_THREADS or torch says")


def check_schedule(net: ModelConfig, sparsity: SparsityConfig, steps: object = None) -> None:
    """A schedule must fit the model, with not more layers and experts than there are, and the run's number of steps."""
    require(
        len(sparsity.head) <= net.n_layers,
        f"sparsity.head has {len(sparsity.head)} entries for n_layers={net.n_layers}: shorten it to the first layers",
    )
    for layer, k in enumerate(sparsity.head):
        require(k <= net.n_experts, f"sparsity.head[{layer}]={k} exceeds n_experts={net.n_experts}")
    require(
        not sparsity.head or sparsity.switch_step > 0,
        f"sparsity.head={list(sparsity.head)} has no effect without sparsity.switch_step, the first step that does not use"
        " it: set it, or head: []",
    )
    require(
        not sparsity.head or sparsity.switch_step != steps,
        f"sparsity.switch_step={sparsity.switch_step} is trainer.max_steps: the run would end with a model that no step has"
        f" trained; switch earlier, or never (switch_step={sparsity.switch_step + 1})",
    )
