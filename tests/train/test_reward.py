"""Rewards: the policy's gradient by hand, groups that say nothing, a null arm without a signal, and a stage that resumes."""

from __future__ import annotations

import itertools
import shutil
import signal

import pytest
import tiny
import torch
from test_post import STAGE, at, config, fit
from test_resume import diary, same
from tiny import child, ending

from sigma_lite import record
from sigma_lite.balance.balancer import GlobalLBL, SequenceLBL, WithBias
from sigma_lite.balance.objective import objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import BalanceConfig, ConfigError, ModelConfig, RewardConfig
from sigma_lite.data.chat import Marks
from sigma_lite.data.rows import IGNORED, Batch
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.base import Assigned
from sigma_lite.papers.kmeans import OnlineKMeans
from sigma_lite.papers.rounding import Rounded
from sigma_lite.runfile import checked, load_run
from sigma_lite.serve.generate import Continuation
from sigma_lite.train.callbacks import names
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.reward import (
    Reinforcement,
    advantages,
    answered,
    drawn_seeds,
    mismatch,
    policy_loss,
    problems_of,
    shuffled,
)

NET = ModelConfig(vocab_size=16, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, d_expert=8)
FRAME = Marks(0, 1, 2, 3)


def decoded(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def asked(*problems: tuple[list[int], list[int]]) -> Batch:
    """Rows of one problem each: (what the user says, answer)."""
    ids = [[0, 1, *said, 2, *answer, 3] for said, answer in problems]
    rows = torch.tensor([one + [0] * (max(map(len, ids)) - len(one)) for one in ids])
    nothing = torch.zeros_like(rows[:, 1:])
    return Batch(rows[:, :-1], rows[:, 1:], nothing, nothing, nothing, nothing[:, 0])


def written(tokens: list[int], stopped: bool = True) -> Continuation:
    return Continuation(tokens, stopped, [], [])


def gradient(loss, model) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, materialize_grads=True)


PROMPTS = [[0, 1, 5, 2]] * 3 + [[0, 1, 5, 6, 7, 2]] * 3
ANSWERS = [written([8, 9]), written([8]), written([4, 4, 4], stopped=False), written([]), written([9, 9]), written([6])]
REWARDS = torch.tensor([[1.0, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize("normalise", [True, False])
def test_the_gradient_is_that_of_a_loop_over_answers(normalise):
    model = Transformer(NET)
    rows = answered(PROMPTS, ANSWERS, fill=0, end=3)
    loss, _, routings = policy_loss(model, rows, advantages(REWARDS, normalise)[0].flatten())

    by_hand, tokens = torch.zeros(()), 0
    for prompt, own, reward, group in zip(PROMPTS, ANSWERS, REWARDS.flatten(), REWARDS.repeat_interleave(3, 0), strict=True):
        said = own.tokens + [3] * own.stopped
        logits = model(torch.tensor([prompt + said])).logits[0]
        beyond = reward - sum(group) / 3
        if normalise:
            beyond = beyond / (sum((r - sum(group) / 3) ** 2 for r in group) / 3) ** 0.5
        for place, token in enumerate(said, start=len(prompt)):
            by_hand = by_hand - beyond * (logits[place - 1].exp()[token] / logits[place - 1].exp().sum()).log()
        tokens += len(said)
    torch.testing.assert_close(loss, by_hand / tokens)
    for ours, theirs in zip(gradient(loss, model), gradient(by_hand / tokens, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    read = sum(len(p) + len(a.tokens) + a.stopped - 1 for p, a in zip(PROMPTS, ANSWERS, strict=True))
    assert {len(r.ids) for r in routings} == {read}, "what fills rows up is in no load"


class Judged(Reinforcement):
    """Rewards that a test decides."""

    def rewards(self, asked, written):
        return self.decided(asked, written)


def reinforcement(decided, model=None, **settings) -> Judged:
    made = Judged(RewardConfig(**{"answers": 4, "max_new_tokens": 3, **settings}), model or Transformer(NET), FRAME, decoded)
    made.decided = decided
    return made


def test_a_group_of_equal_rewards_contributes_nothing():
    """Neither to the gradient nor to the loads: as if it had not been asked."""
    one, other, third = ([5], [7]), ([6, 6], [8]), ([7], [9])
    alone = reinforcement(lambda asked, written: [1, 0, 0, 1] * 2)
    with_dead = reinforcement(lambda asked, written: [1, 0, 0, 1] * 2 + [1, 1, 1, 1], alone.model)
    for dead in (third, one):
        few, more = alone(asked(one, other), 5, 0), with_dead(asked(one, other, dead), 5, 0)
        assert torch.equal(few.loss, more.loss) and few.live and more.live
        assert all(
            torch.equal(a, b) for a, b in zip(gradient(few.loss, alone.model), gradient(more.loss, alone.model), strict=True)
        )
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(few.routings, more.routings, strict=True))
        assert (few.told["dead"], more.told["dead"]) == (0, pytest.approx(1 / 3))
    nothing = reinforcement(lambda asked, written: [0] * 8)(asked(one, other), 5, 0)
    assert not nothing.live and nothing.told["dead"] == 1 and nothing.loss == 0
    assert not any(g.any() for g in gradient(nothing.loss, alone.model))
    assert {r.logits.shape for r in nothing.routings} == {(0, 4)} and {r.ids.shape for r in nothing.routings} == {(0, 1)}


@pytest.mark.parametrize("loss", ["global", "micro", "top1"])
def test_a_micro_batch_of_dead_groups_is_in_no_load(loss):
    """A step's loads, losses and gradient are those of the micro-batches that live; a dead one adds zero, not NaN."""
    learner = reinforcement(lambda asked, written: [1, 0, 0, 1] * 2)
    dead = reinforcement(lambda asked, written: [1] * 8, learner.model)
    rows, whole, pooled = (
        asked(([5], [7]), ([6, 6], [8])),
        objective(BalanceConfig(loss=loss), 2, main="policy"),
        PooledCounts(),
    )
    lives = learner(rows, 0, 0)
    whole(lives.loss, lives.routings, pooled, 2)
    before = pooled.counts_LE.clone()
    nothing = dead(rows, 0, 0)
    losses = whole(nothing.loss, nothing.routings, pooled, 2)
    assert torch.equal(pooled.counts_LE, before) and before.any()
    assert losses.total == 0 and not any(g.any() for g in gradient(losses.total, learner.model))


def test_the_null_arm_has_no_mean_signal():
    """Over all ways to deal a group's rewards the mean gradient is zero; dealt by seeds, every way is as likely."""
    model, rows = Transformer(NET), answered(PROMPTS[:3], ANSWERS[:3], 0, 3)
    ways = [torch.tensor([REWARDS[0, list(order)].tolist()]) for order in itertools.permutations(range(3))]
    each = [gradient(policy_loss(model, rows, advantages(dealt, True)[0][0])[0], model) for dealt in ways]
    true = max(float(g.abs().max()) for g in each[0])
    assert true > 1e-3
    for of_weight in zip(*each, strict=True):
        assert torch.stack(of_weight).mean(0).abs().max() < 1e-6 * max(1, true)
    seeds = drawn_seeds(0, 3, 0, 3000)
    dealt = shuffled(REWARDS[:1].expand(3000, 3), seeds)
    assert torch.equal(dealt.sum(1), torch.ones(3000))
    assert (dealt.mean(0) - 1 / 3).abs().max() < 4 * (2 / 9 / 3000) ** 0.5
    dealing = reinforcement(lambda asked, written: [1, 0, 0, 0] * 8, null=True)
    true = reinforcement(lambda asked, written: [1, 0, 0, 0] * 8, dealing.model)
    batch = asked(*[([5], [7])] * 8)
    shown, real = dealing(batch, 0, 0), true(batch, 0, 0)
    assert shown.told["reward"] == real.told["reward"] == 0.25 and shown.loss != real.loss


@pytest.mark.parametrize("null", [False, True])
def test_a_bandit_is_learned_in_seconds_and_not_from_dealt_rewards(null):
    """Four prompts, sixteen arms, one of them pays: from 1 in 16 to 9 in 10 within 60 steps."""
    arms = asked(([4], [7]), ([5], [8]), ([6], [9]), ([7], [10]))
    pays = lambda asked, written: [own.tokens[:1] == asked[n // 16][1] for n, own in enumerate(written)]  # noqa: E731
    learner = reinforcement(pays, answers=16, max_new_tokens=1, null=null)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=0.01, weight_decay=0)
    earned = []
    for step in range(60):
        outcome = learner(arms, step, 0)
        optimizer.zero_grad()
        (outcome.loss if outcome.live else 0 * outcome.loss).backward()
        optimizer.step()
        earned.append(float(outcome.told["reward"]))
    assert sum(earned[:3]) / 3 < 0.25
    assert sum(earned[-5:]) / 5 < 0.4 if null else sum(earned[-5:]) / 5 > 0.9


def test_answers_do_not_depend_on_how_a_step_is_cut():
    model = Transformer(NET)
    said = []
    note = lambda asked, written: [said.append(own.tokens) or len(own.tokens) % 2 for own in written]  # noqa: E731
    rows = [([5], [7]), ([6, 6], [8]), ([7], [9]), ([4], [4])]
    reinforcement(note, model)(asked(*rows), 2, 0)
    whole, said[:] = [*said], []
    for first in (0, 2):
        reinforcement(note, model)(asked(*rows[first : first + 2]), 2, first)
    assert said == whole
    reinforcement(note, model)(asked(*rows), 3, 0)
    assert said[16:] != whole, "another step draws others"


def test_answers_are_written_in_evaluation_mode():
    """K-means moves by what it reads in training; what is written moves nothing, and the mode is what it was before."""
    model = Transformer(NET, Parts(router=OnlineKMeans)).train()
    learner = reinforcement(lambda asked, written: [1, 0, 0, 1] * len(asked), model)
    before = [block.moe.router.weight.clone() for block in model.blocks]
    learner.ask(asked(([5], [7]), ([6, 6], [8])), 0, 0)
    assert all(torch.equal(was, block.moe.router.weight) for was, block in zip(before, model.blocks, strict=True))
    assert model.training and all(module.training for module in model.modules())
    learner.model.eval()
    learner.ask(asked(([5], [7])), 0, 0)
    assert not model.training


@pytest.mark.parametrize("router", [Assigned, Rounded])
def test_a_router_that_sees_the_batch_in_training_is_refused(router):
    """It would write by one rule and learn by another."""
    with pytest.raises(ConfigError, match=f"{router.__name__} decides token by token when it writes.* choose a router"):
        Reinforcement(RewardConfig(answers=4), Transformer(NET, Parts(router=router)), FRAME, decoded)


def test_mismatch_counts_experts_and_distances():
    """In fp32 writing and training agree; one other expert and a log p moved by 0.3 are found."""
    learner = reinforcement(lambda asked, written: [1, 0, 0, 1] * 2)
    told = learner(asked(([5], [7]), ([6, 6], [8])), 0, 0).told
    assert told["experts_differ"] == 0 and told["logp_differ"] < 1e-5
    rows = answered([[0, 1, 2]], [written([7])], 0, 3)
    _, nats_N, routings = policy_loss(learner.model, rows, torch.ones(1))
    ids = [r.ids.clone() for r in routings]
    ids[1][2] = (ids[1][2] + 1) % 4
    logps = [-nats_N[0].item(), -nats_N[1].item() + 0.3]
    found = mismatch([Continuation([7], True, ids, logps)], nats_N.detach(), routings)
    assert found["experts_differ"] == pytest.approx(1 / 8) and found["logp_differ"] == pytest.approx(0.15, rel=1e-4)


def test_rewards_are_for_answers_that_end_and_have_the_right_result():
    text = lambda ids: "".join("0123456789>"[i] for i in ids)  # noqa: E731
    made = Reinforcement(RewardConfig(answers=4), Transformer(NET), FRAME, text)
    asked = [([0], [4, 10, 9, 5])]
    cases = [written([9, 5]), written([1, 10, 9, 5]), written([9, 5], stopped=False), written([4, 10, 9])]
    assert made.rewards(asked, cases) == [True, True, False, False]


def test_problems_are_cut_out_of_rows():
    assert problems_of(asked(([5, 6], [7]), ([5], [])), 2, 3) == [([0, 1, 5, 6, 2], [7]), ([0, 1, 5, 2], [])]
    rows = answered([[0, 1, 5, 2]], [written([7], stopped=False)], fill=0, end=3)
    assert rows.targets_BS.tolist() == [[IGNORED] * 3 + [7]] and rows.ids_BS.tolist() == [[0, 1, 5, 2]]


# -------------------------------------------------------------------------------------------------------------- stages

REPLAY = {"source": "files", "path": "text", "heldout": 0.2}
SOURCES = {
    "problems": {"source": "tasks", "tasks": ["sort1", "reverse1"], "max_documents": 400, "heldout": 0.3},
    "replay": REPLAY,
}
REWARDED = {
    "data__mixture": {"sources": SOURCES, "weights": {"problems": 1, "replay": 0}},
    "data__rows": {"length": 64, "per_step": 8, "per_micro": 4, "packed": False},
    "model__reward": {"answers": 8, "max_new_tokens": 6},
    "trainer__max_steps": 6,
}
BEGUN = {
    "data__mixture": {"sources": SOURCES, "weights": {"problems": 1, "replay": 0}},
    "trainer__max_steps": 40,
    "trainer__val_check_interval": 40,
    "save__every": 40,
}


@pytest.fixture(scope="module")
def rewarded(finished, tmp_path_factory):
    """A folder with a pretrained run, a short first stage in begun/ and a stage of rewards in one/. Do not write into it."""
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit("begun", "run", **BEGUN)
        fit("one", "begun", **REWARDED)
    return folder


@pytest.fixture
def here(rewarded, tmp_path, monkeypatch):
    shutil.copytree(rewarded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(run: str) -> list[dict]:
    return [entry["rewards"] for entry in record.read(f"{run}/record.jsonl", "step")]


def test_a_killed_stage_of_rewards_is_bitwise_the_one_that_was_not(here):
    config("again", "begun", **REWARDED)
    for step in (1, 5):
        assert ending(child(["fit", "-c", "again.yaml"], at(step))) == -signal.SIGKILL
    fit("again", "begun", **REWARDED)
    same(tiny.state("again"), tiny.state("one"))
    seen = [[e for e in diary(here / run) if e["kind"] in ("step", "validation")] for run in ("again", "one")]
    assert seen[0] == seen[1] and any(0 < entry["reward"] < 1 and entry["dead"] < 1 for entry in told("one"))


def test_the_diary_says_rewards_lengths_and_dead_groups(rewarded, monkeypatch):
    monkeypatch.chdir(rewarded)
    steps = record.read("one/record.jsonl", "step")
    for entry in steps:
        assert set(entry["terms"]) == {"policy", "balance", "z"}
        found = entry["rewards"]
        assert 0 <= found["reward"] <= found["ended"] <= 1 and 1 <= found["length"] <= 6 and 0 <= found["dead"] <= 1
        assert found["experts_differ"] == 0 and found["logp_differ"] < 1e-4
    assert record.read("one/record.jsonl", "run")[0]["config"]["reward"]["answers"] == 8
    assert names.of_step(steps[0], {})["reward/dead"] == steps[0]["rewards"]["dead"], "loggers are told too"


def test_a_step_without_a_live_group_changes_nothing(here):
    """A model that was taught no answer earns nothing, so only what decays without a gradient could move: nothing does."""
    untaught = {"model__reward": {"answers": 4, "max_new_tokens": 1}, "model__optim__weight_decay": 0.0}
    fit("idle", "run", **REWARDED | untaught | {"trainer__max_steps": 2})
    assert [entry["dead"] for entry in told("idle")] == [1, 1], "an answer of one token cannot end"
    before, after = tiny.state("run")["state_dict"], tiny.state("idle")["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dead_step_moves_nothing_by_momentum_either(here, monkeypatch):
    rewards, calls = Reinforcement.rewards, []

    def then_none(self, asked, written):
        calls.append(len(asked))
        return rewards(self, asked, written) if len(calls) <= 4 else [False] * len(written)

    monkeypatch.setattr(Reinforcement, "rewards", then_none)
    fit("stuck", "begun", **REWARDED | {"trainer__max_steps": 4})
    assert [entry["dead"] == 1 for entry in told("stuck")][-2:] == [True, True]
    before, after = tiny.state("stuck", 2), tiny.state("stuck", 4)
    assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in before["state_dict"])
    moments = before["optimizer_states"][0]["state"].values()
    assert any(one["exp_avg"].any() for one in moments), "there was a momentum that could have moved them"


def test_the_null_arm_is_another_run(here):
    fit(
        "dealt",
        "begun",
        **REWARDED | {"model__reward": {**REWARDED["model__reward"], "null": True}, "trainer__max_steps": 2},
    )
    assert told("dealt")[0] == pytest.approx(told("one")[0], rel=1e-6, abs=1e-7), "the same answers, judged alike"
    one, null = (record.read(f"{run}/record.jsonl", "step")[0]["grad_norm"] for run in ("one", "dealt"))
    assert one != null


def test_rewards_in_half_precision(here):
    """Weights that autocast has cast while answers were written are cast again where gradients are needed."""
    fit("half", "begun", **REWARDED | {"trainer__precision": "bf16-mixed", "trainer__max_steps": 2})
    steps = record.read("half/record.jsonl", "step")
    assert any(entry["grad_norm"] > 0 for entry in steps)


REFUSED = {
    "packed": ({"data__rows": {"length": 64, "per_step": 4, "per_micro": 2}}, "packed=false"),
    "a source of text": ({"data__mixture": {"sources": SOURCES, "weights": {"problems": 1, "replay": 1}}}, "'replay'"),
    "a lonely answer": ({"model__reward": {"answers": 1}}, "2 answers or more"),
    "loss of each row": ({"model__balance": {"loss": "sequence"}}, "choose global"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rewarded_is_refused(case):
    changes, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        checked(tiny.settings(**STAGE | REWARDED | changes))


def test_a_loss_of_rows_is_refused_and_what_is_not_read_is_not():
    """Of a balancer of the reader's own too; balance.loss does not matter beside it."""
    rewards, rows = RewardConfig(answers=4), BalanceConfig(loss="sequence")
    for given in ({"balance": rows}, {"custom_balance": SequenceLBL()}, {"custom_balance": WithBias(SequenceLBL(), "sign")}):
        with pytest.raises(ConfigError, match="model.reward.answers=4: the loss of .*SequenceLBL.* is a mean over rows"):
            SigmaLit(NET, reward=rewards, **given)
    SigmaLit(NET, reward=rewards, balance=rows, custom_balance=GlobalLBL())
    own = {"model__custom_balance": "sigma_lite.papers.shinka.Shinka", "model__balance": {"loss": "sequence"}}
    assert checked(tiny.settings(**STAGE | REWARDED | own)).reward.answers == 8


def test_the_stage_of_the_toy():
    run = load_run(["scaled_configs/post/reward.yaml"], fit=True)
    assert (run.reward.answers, run.rows.per_step, run.start.init_from) == (8, 16, "runs/post/begun")
