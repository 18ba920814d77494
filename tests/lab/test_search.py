"""The search over balance losses: expressions by hand, typed children, novelty by gradients, a log that goes on."""

from __future__ import annotations

import json
import math
import random
from concurrent.futures import Future
from pathlib import Path

import pytest
import small
import torch

from sigma_lite import cli, record
from sigma_lite.balance.balancer import GlobalLBL, Top1LBL
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ConfigError
from sigma_lite.figures.searched import Tried, fitness_in_order, loss_against_deviation
from sigma_lite.lab import retrain as again
from sigma_lite.lab import search as searching
from sigma_lite.lab.evolve import MOST_NODES, PROBES, behaviour, crossed, distance, flaw, grown, mutated
from sigma_lite.lab.expressions import SCALAR, VECTOR, Candidate, evaluate, read
from sigma_lite.lab.search import FOUNDER, Individual, Islands, Search, noise_of, read_log, run_search, sampling_weights
from sigma_lite.lab.search_page import write_search_page
from sigma_lite.lab.trials import Found, Trial, Trials, busiest, deviation, search_scale, train_one
from sigma_lite.model import Routing
from sigma_lite.papers.shinka import Shinka
from sigma_lite.storage import StorageError

SHINKA = "mean(f * P) + 0.1 * ((1.5 - entropy(P)) * mean(relu(0.64 - f)))"
SMALL = Search(islands=2, children=3, steps=1, repeats=3, migrate=1)


def routing(T: int = 40, E: int = 8, K: int = 2, seed: int = 0) -> tuple[Routing, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator)).requires_grad_()
    probs = logits.softmax(-1)
    ids = probs.topk(K).indices
    return Routing(probs, ids, probs.gather(1, ids), logits), load_share(expert_counts(ids, E))


# --------------------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("mean(f * P)", (2 * 3 + 0 * 1 + 2 * 0 + 0 * 0) / 4),
        ("largest(f) - smallest(P)", 2),
        ("mean(square(P - f)) / sure", (1 + 1 + 4 + 0) / 4 / 0.5),
        ("mean(relu(0.5 - f)) * K", 0.25 * 2),
        ("log(E) + sqrt(E) + exp(K - 2) + abs(-3)", math.log(4) + 2 + 1 + 3),
        ("entropy(f)", math.log(2) / math.log(4)),
        ("mean(stop(P) / (f + 1))", (1 + 1) / 4),
    ],
)
def test_values_by_hand(text, value):
    """f = 2, 0, 2, 0 and P = 3, 1, 0, 0 times an even share; E = 4, K = 2, sure = 1/2."""
    facts = {
        "f": torch.tensor([2.0, 0.0, 2.0, 0.0]),
        "P": torch.tensor([3.0, 1.0, 0.0, 0.0]),
        "sure": torch.tensor(0.5),
        "K": torch.tensor(2.0),
        "E": torch.tensor(4.0),
    }
    assert evaluate(read(text), facts).item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "own"),
    [("mean(f * P)", GlobalLBL()), ("mean(P * P) / sure", Top1LBL()), (SHINKA, Shinka())],
    ids=["LBL", "Top-1", "Shinka"],
)
def test_known_losses_are_expressions_with_the_same_gradient(text, own):
    r, f = routing(K=1)
    values = [balancer.loss(r, f) for balancer in (Candidate(text), own)]
    gradients = [torch.autograd.grad(value, r.logits, retain_graph=True)[0] for value in values]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_adding_a_constant_to_a_tokens_logits_changes_nothing():
    r, f = routing()
    moved = r._replace(probs=(r.logits + torch.randn(40, 1)).softmax(-1))
    for text in ("mean(f * P)", "mean(square(P)) / sure", "entropy(P) + largest(P)"):
        torch.testing.assert_close(Candidate(text).loss(r, f), Candidate(text).loss(moved, f), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mean(g * P)", "'g', which does not exist"),
        ("f * P", "is a vector"),
        ("mean(sure)", "takes a vector, and sure is a scalar"),
        ("means(P)", "nearest|mean"),
        ("__import__('os')", "does not exist"),
        ("P.sum()", "none of"),
        ("mean(P) if K else 1", "none of"),
        ("mean(P", "is no expression"),
        ("mean(1e999 * P)", "none of"),
    ],
)
def test_other_text_is_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        read(text)


@pytest.mark.parametrize("T", [40, 0])
def test_gradients_are_finite_at_degenerate_loads(T):
    """One sure expert, flat, an expert never chosen, no tokens: for 300 random expressions, and for steep ones."""
    chance, E = random.Random(0), 8
    steep = ["exp(exp(largest(P)))", "mean(1 / (P - P))", "log(smallest(P)) / mean(f - f)", "largest(square(square(P / 0)))"]
    texts = steep + [str(grown(chance, SCALAR, 5)) for _ in range(150)]
    one = torch.eye(E)[0]
    for logits, f in ((1e4 * one.expand(T, E), one), (torch.zeros(T, E), one), (torch.zeros(T, E), torch.full((E,), 1 / E))):
        for text in texts:
            z = logits.clone().requires_grad_()
            probs = z.softmax(-1)
            ids = torch.zeros(T, 1, dtype=torch.int64)
            loss = Candidate(text).loss(Routing(probs, ids, probs.gather(1, ids), z), f)
            assert loss.isfinite() and loss.dim() == 0
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, z)
                assert gradient.isfinite().all(), text


def test_an_empty_slot_is_not_sure():
    r, f = routing(K=2)
    r = r._replace(ids=torch.where(torch.arange(40)[:, None] % 2 == 0, r.ids, -1))
    even = r.probs[::2].gather(1, r.ids[::2]).sum() / 40
    torch.testing.assert_close(Candidate("sure").loss(r, f), even)


# ------------------------------------------------------------------------------------------------------------ children


def test_every_child_can_be_evaluated_and_read_again():
    chance, living = random.Random(0), [read(FOUNDER), read("mean(P * P) / sure"), read(SHINKA)]
    facts = {
        "f": PROBES[0][0],
        "P": PROBES[0][1],
        "sure": torch.tensor(0.3),
        "K": torch.tensor(1.0),
        "E": torch.tensor(16.0),
    }
    kinds = set()
    for _ in range(600):
        child = (
            mutated(chance, chance.choice(living)) if chance.random() < 0.6 else crossed(chance, *chance.sample(living, 2))
        )
        assert child.kind == SCALAR and child.size <= MOST_NODES and read(str(child)) == child
        assert evaluate(child, facts).dim() == 0
        living.append(child)
        kinds.add(child.op or "number")
    assert len(kinds) > 10, "children of many shapes"


def test_a_grown_tree_has_its_type():
    chance = random.Random(1)
    for kind in (VECTOR, SCALAR):
        assert {grown(chance, kind, depth).kind for depth in range(6) for _ in range(30)} == {kind}


# ------------------------------------------------------------------------------------------------------------- novelty


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mean(P * f)", "not new"),
        ("mean(f * P) + 3 * K", "not new"),  # a constant has no gradient
        ("mean(f * P) + mean(P)", "not new"),  # and each token's probabilities sum to 1
        ("1.005 * mean(f * P)", "not new"),
        ("mean(stop(P) * f)", "no gradient"),
        ("entropy(f)", "no gradient"),
        ("mean(P)", "no gradient"),
        ("2 * mean(f * P)", ""),  # another weight is another loss
        ("mean(P * P)", ""),
        ("0 - mean(f * P)", ""),
    ],
)
def test_novelty_is_told_by_what_trains(text, why):
    assert flaw(behaviour(read(text)), [behaviour(read(FOUNDER))]) == why


def test_distance_of_behaviours():
    lbl, opposite = behaviour(read(FOUNDER)), behaviour(read("0 - mean(f * P)"))
    assert distance(lbl, lbl) == 0
    alive = (lbl.norm(dim=1) > 0).double().mean().item()
    assert distance(lbl, opposite) == pytest.approx(2 * alive)
    assert distance(lbl, behaviour(read("2 * mean(f * P)"))) == pytest.approx(alive / 2)


# ------------------------------------------------------------------------------------------------------------- parents


def one(number: int, fitness: float | None, island: int = 0, generation: int = 1, text: str = FOUNDER) -> Individual:
    return Individual(number, generation, island, "mutation", (), text, fitness)


def test_parents_are_drawn_by_fitness_and_by_few_children():
    """Fitness 1, 2, 3: median 2, its median distance 1, so sigmoids of 10, 0 and -10; the best with 4 children: a fifth."""
    living = [one(1, 1.0), one(2, 2.0), one(3, 3.0)]
    sigmoid = [1 / (1 + math.exp(-x)) for x in (10, 0, -10)]
    assert sampling_weights(living, {}) == pytest.approx(sigmoid)
    assert sampling_weights(living, {1: 4}) == pytest.approx([sigmoid[0] / 5, *sigmoid[1:]])
    assert sampling_weights([one(1, 1.0)], {}) == [0.5]


def test_the_best_of_an_island_migrates_to_the_next_and_failures_have_no_children():
    islands = Islands(Search(islands=2, children=1, migrate=1))
    islands.add(one(0, 5.0, generation=0))
    islands.add(one(1, 3.0, island=0))
    assert [i.number for i in islands.living(0)] == [0], "a generation that is not finished has no children"
    islands.add(one(2, None, island=1))
    assert islands.done == 1
    assert [i.number for i in islands.living(0)] == [1, 0] and [i.number for i in islands.living(1)] == [1, 0]
    assert [i.number for i in islands.best()] == [1, 0]


@pytest.mark.parametrize("error", [OSError("no space left"), MemoryError(), StorageError("run is full")])
def test_what_a_machine_lacks_is_no_fault_of_an_expression(tmp_path, monkeypatch, error):
    """In the log it would be a failure, and the expression never be tried again; a loss that is no number is one."""

    def fails(*_) -> None:
        raise error

    monkeypatch.setattr("sigma_lite.lab.worker.train", fails)
    with pytest.raises(type(error)):
        train_one(Trial(FOUNDER, 0), search_scale(1), tmp_path)
    error = ValueError("its loss is not a number")
    assert "not a number" in train_one(Trial(FOUNDER, 0), search_scale(1), tmp_path).failed


def test_noise_is_the_interval_of_a_mean_from_a_mean():
    """Three trainings of spread 1: t = 4.303 with 2 degrees of freedom, over 2 and 3 seeds."""
    noise = noise_of([1.0, 2.0, 3.0], 2)
    assert noise[:2] == (2.0, 1.0) and noise.floor == pytest.approx(4.303 * (1 / 2 + 1 / 3) ** 0.5)
    assert noise.gain(one(1, 0.5)) == 1.5 and noise.gain(one(1, None)) == -math.inf


def test_deviation_and_busiest_by_hand():
    loads = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    assert deviation(loads) == 0.75 and busiest(loads[::-1]) == 3 and busiest(loads) == 0


# ------------------------------------------------------------------------------------------------------------ the log


class Formula:
    """Instead of training: a number of the gradient, so that a test knows what is best. It may be cut off."""

    def __init__(self, cut_after: int = 10**9):
        self.left, self.seen = cut_after, []

    def all(self, trials):
        for trial in trials:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.seen.append(trial)
            away = distance(behaviour(read(trial.text)), behaviour(read("mean(P * P) / sure")))
            failed = "it did" if "largest" in trial.text else ""
            yield Found(2 + away + 0.01 * (trial.seed % 3), 0.5, 1.0, 0.1, failed)

    def close(self):
        pass


def lines(out) -> list[dict]:
    return [entry for entry in record.read(out / "search.jsonl") if entry["kind"] != "search"]


def test_a_search_that_was_cut_off_anywhere_writes_the_same_log(tmp_path):
    scale = small.scale()
    run_search(SMALL, scale, tmp_path / "whole", generations=3, trials=Formula())
    whole = lines(tmp_path / "whole")
    assert len(whole) == 3 + 1 + 3 * 6 and any(entry.get("failed") for entry in whole)
    for cut in (1, 4, 10, 21):
        out = tmp_path / str(cut)
        with pytest.raises(KeyboardInterrupt):
            run_search(SMALL, scale, out, generations=3, trials=Formula(cut))
        with open(out / "search.jsonl", "ab") as log:
            log.write(b'{"kind":"individual","st')  # a kill in the middle of a line
        run_search(SMALL, scale, out, generations=3, trials=Formula())
        assert lines(out) == whole
    other = tmp_path / "other"
    run_search(SMALL.__class__(**{**vars(SMALL), "seed": 1}), scale, other, generations=3, trials=Formula())
    assert [e.get("text") for e in lines(other)] != [e.get("text") for e in whole]


def test_a_search_finds_what_its_fitness_rewards_and_repeats_nothing(tmp_path):
    islands, noise = run_search(SMALL, small.scale(), tmp_path, generations=6, trials=Formula())
    best, first = islands.best()[0], next(each for each in islands.best() if each.generation <= 1)
    assert best.generation > 1 and best.fitness < first.fitness < islands.individuals[0].fitness
    acts = [behaviour(read(each.text)) for each in islands.individuals]
    assert all(flaw(act, acts[:i]) == "" for i, act in enumerate(acts))
    assert {each.by for each in islands.individuals} == {"founder", "mutation", "crossover"}
    assert sum(sum(each.rejected.values()) for each in islands.individuals) > 0
    read_again, same = read_log(tmp_path)
    assert read_again.individuals == islands.individuals and read_again.homes == islands.homes and same == noise


def test_a_log_of_other_settings_or_code_is_refused(tmp_path, monkeypatch):
    run_search(SMALL, small.scale(), tmp_path, generations=1, trials=Formula())
    other = Search(**{**vars(SMALL), "weight": 0.5})
    with pytest.raises(ConfigError, match=r"is of a search with weight=0\.1: give"):
        run_search(other, small.scale(), tmp_path, generations=1, trials=Formula())
    with pytest.raises(ConfigError, match="is of a search with scale="):
        run_search(SMALL, small.scale(13), tmp_path, generations=1, trials=Formula())
    code = {**searching.package_code(), "balance/losses.py": "other"}
    monkeypatch.setattr(searching, "package_code", lambda: code)
    with pytest.raises(ConfigError, match=r"losses\.py.*--reuse"):
        run_search(SMALL, small.scale(), tmp_path, generations=2, trials=Formula())
    run_search(SMALL, small.scale(), tmp_path, generations=2, trials=Formula(), reuse=True)


def test_a_hook_proposes_and_its_nonsense_is_counted(tmp_path):
    said, seen = ["tried before all", "nonsense(", "mean(f * P)", "mean(P * P)", "mean(P * P * P)", "mean(f * f * P)"], []

    def hook(known, chance):
        seen.append(known)
        return said[min(len(seen), len(said)) - 1] if len(seen) <= len(said) else f"{len(seen)} * mean(f * P)"

    search = Search(**{**vars(SMALL), "hooked": 1.0})
    islands, _ = run_search(search, small.scale(), tmp_path, generations=1, trials=Formula(), hook=hook)
    first, second = islands.individuals[1:3]
    assert first.text == "mean((P * P))" and first.by == "hook"
    assert first.rejected == {"hook: ConfigError": 1, "not new": 1} and second.text.count("P") == 3
    assert seen[1] == [(FOUNDER, pytest.approx(islands.individuals[0].fitness))]


def test_a_hook_that_cannot_be_called_is_told_before_any_training(tmp_path):
    with pytest.raises(ConfigError, match="first call ended with TypeError"):
        run_search(SMALL, small.scale(), tmp_path / "new", generations=1, trials=Formula(), hook=lambda: "P")
    assert not (tmp_path / "new").exists()


def test_a_search_without_anything_new_says_so(tmp_path):
    search = Search(**{**vars(SMALL), "hooked": 1.0})
    with pytest.raises(ConfigError, match="200 proposals in a row.*at its end"):
        run_search(search, small.scale(), tmp_path, generations=1, trials=Formula(), hook=lambda *_: FOUNDER)


@pytest.mark.parametrize("wrong", [{"islands": 0}, {"repeats": 2}, {"weight": -1.0}, {"seeds": (0, 0)}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Search(**wrong)


# -------------------------------------------------------------------------------------------------------- in training


class Here:
    """A pool of processes that is this one."""

    def submit(self, does, *arguments):
        done = Future()
        done.set_result(does(*arguments))
        return done

    def shutdown(self, **_):
        pass


@pytest.mark.slow
def test_a_tiny_search_of_two_generations_trains_and_its_best_train_again(place, forks, monkeypatch, capsys):
    monkeypatch.setattr(Trials, "_begin", lambda self: Here())
    search, scale = Search(islands=1, children=2, steps=4, repeats=3), small.scale(4)
    islands, noise = run_search(search, scale, "search", generations=2, trials=Trials(scale, "search"))
    assert len(islands.individuals) == 5 and islands.done == 2 and noise.spread > 0
    founder = islands.individuals[0]
    first = [entry["bits"] for entry in record.read("search/search.jsonl", "founder")][:2]
    assert list(founder.bits) == first, "the same training has the same bits, whenever it runs"
    assert not list((place / "search" / "runs").iterdir()), "what has trained is deleted"
    assert 2 < founder.bits[0] < 8 and 0 <= founder.deviation[0] <= 2 and not founder.failed
    with pytest.raises(ConfigError, match="the search's own"):
        again.retrain("search", seeds=(0, 100))
    with pytest.raises(ConfigError, match="none of"):
        again.retrain("search", beside=["mean(f @ P)"])
    made = retrained(monkeypatch, scale)
    best = again.named(again.chosen(islands, 1)[0])
    assert list(made[0]["arms"]) == [again.BASE, *(arm.name for arm in again.BESIDE), best, "mean((f * stop(P)))"]
    text = again.in_words(*read_log("search"), made)
    assert "Clearly better than the founder on every corpus" in text and "Top-1 LBL" in text
    page = write_search_page("search").read_text("utf-8")
    assert 'id="anew"' in page and "LBL, weight times 25" in page and "over 2 seeds" in page


def retrained(monkeypatch, scale):
    import dataclasses

    monkeypatch.setattr(again, "search_scale", lambda steps, corpus, seeds: dataclasses.replace(scale, seeds=tuple(seeds)))
    own = ["mean(f * stop(P))"]
    return again.retrain("search", best=1, seeds=(100, 101), corpora=("tiny",), beside=own, runs="runs", workers=2)


def test_beside_the_best_trains_the_founder_at_larger_weights():
    own = {arm.name: arm.patch["model"]["custom_balance"]["init_args"]["expression"] for arm in again.BESIDE[2:]}
    found, f = routing()
    for times in (5, 25):
        loss = Candidate(own[f"LBL, weight times {times}"]).loss(found, f)
        torch.testing.assert_close(loss, times * GlobalLBL().loss(found, f))


def test_a_page_shows_what_was_tried_in_order_and_the_best_of_it(tmp_path):
    run_search(SMALL, small.scale(), tmp_path, generations=3, trials=Formula())
    islands, noise = read_log(tmp_path)
    page = write_search_page(tmp_path).read_text("utf-8")
    assert page.rindex(islands.best()[0].text) < page.rindex(islands.best()[1].text) and 'id="anew"' not in page
    tried = [Tried(one.number, one.by, one.text, one.fitness, 2.0, 0.5) for one in islands.individuals if one.fitness]
    fig = fitness_in_order(tried, noise.mean, noise.floor)
    (best,) = [trace.y for trace in fig.data if trace.name == "best so far"]
    assert list(best) == [min(one.fitness for one in tried[: n + 1]) for n in range(len(tried))]
    assert sum(len(trace.x) for trace in fig.data if trace.mode == "markers") == len(tried)
    with pytest.raises(ConfigError, match=r"no search\.jsonl"):
        write_search_page(tmp_path / "elsewhere")


def test_figures_of_a_search_that_has_not_begun_say_so():
    for fig in (fitness_in_order([], 3.0, 0.1), loss_against_deviation([])):
        assert not fig.data and "no expression" in fig.layout.annotations[0].text


def test_the_scale_is_that_of_one_evaluation():
    scale = search_scale(160, "domains", (7, 8))
    assert scale.steps == 160 and scale.seeds == (7, 8) and scale.name == "search-domains" and not scale.recorded
    with pytest.raises(ConfigError, match="corpus 'books'"):
        search_scale(160, "books")


def test_a_paired_table_is_of_differences_over_seeds():
    def run(arm, seed, bits, f):
        return {"arm": arm, "seed": seed, "heldout": {"bits_per_byte": bits, "f": [f]}}

    even, one_has_all = [0.5, 0.5], [1.0, 0.0]
    runs = [run(again.BASE, s, 2.0 + s, one_has_all) for s in (0, 1)] + [run("#1", s, 1.9 + s, even) for s in (0, 1)]
    results = {"arms": {"#1": {}}, "runs": runs}
    found = again.against_founder(results, "#1", 0.1)
    assert found["bits"].mean == pytest.approx(-0.1) and found["deviation"].mean == -1
    assert found["fitness"].mean == pytest.approx(-0.2) and found["fitness"].high < 0
    assert again.holds([results], "#1", 0.1)
    worse = {**results, "runs": runs[:2] + [run("#1", s, 2.1 + s, one_has_all) for s in (0, 1)]}
    assert not again.holds([results, worse], "#1", 0.1), "on every corpus"


def test_the_command_searches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(searching, "Trials", lambda scale, out, workers: Formula())
    (tmp_path / "model.py").write_text("def mine(known, chance):\n    return f'{chance.random()} * mean(P * P)'\n")
    words = "lab search --generations 1 --islands 1 --children 4 --repeats 3 --out night --propose model.py:mine"
    cli.main(words.split())
    said = capsys.readouterr().out
    assert "less than" in said and "5 expressions" in said
    page = (tmp_path / "night" / "search.html").read_text("utf-8")
    assert f"page          {Path('night/search.html')}" in said and "5 expressions on 1 island in 1 generation;" in page
    (tmp_path / "night" / "search.html").unlink()
    before = (tmp_path / "night" / "search.jsonl").read_bytes()
    cli.main(["lab", "search", "--page", "--out", "night"])
    assert (tmp_path / "night" / "search.html").read_text("utf-8") == page
    assert (tmp_path / "night" / "search.jsonl").read_bytes() == before, "nothing is trained or written"
    log = [json.loads(line) for line in (tmp_path / "night" / "search.jsonl").read_text().splitlines()]
    assert log[0]["settings"]["islands"] == 1 and "--children=4" in log[0]["command"]
    assert "hook" in {entry.get("by") for entry in log}
