"""The family: its table, what is noise in it, its protocol, and a stranger's idea among its arms."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import small
import synthetic_results
import torch
from read_page import Page

from sigma_lite import lab
from sigma_lite.config import ConfigError
from sigma_lite.lab import family_page, measure, rank, standing
from sigma_lite.lab.catalogue import TOP1
from sigma_lite.lab.experiment import Experiment, settings_of
from sigma_lite.lab.family import BASE, PAPERS, PROTOCOL
from sigma_lite.lab.run import run_experiment
from sigma_lite.lab.show import write_page
from sigma_lite.storage import StorageError


def results(bits: dict[str, list[float]], **changes) -> dict:
    """Made-up results in which an arm's seeds end at these bits per byte."""
    n = max(map(len, bits.values()))
    made = synthetic_results.results(tuple(bits), tuple(range(n))) | {"protocol": PROTOCOL} | changes
    made["runs"] = [run for run in made["runs"] if run["seed"] < len(bits[run["arm"]])]
    for run in made["runs"]:
        run["heldout"]["bits_per_byte"] = bits[run["arm"]][run["seed"]]
        run["measured"] = {"token_share": [0.2, 0.4], "leak": {"training": 0.1, "evaluation": 0.0}}
    for facts in made["arms"].values():
        facts["assumes"] = {"k": "any", "causal": "yes", "state": "none", "parameters": "none"}
    return made


MADE = results({BASE: [2.0, 2.1, 2.2], "worse": [2.02, 2.121, 2.222], "noisy": [1.9, 2.2, 2.2], "single": [1.0]})


def test_rows_are_paired_with_the_baseline_best_first():
    found = {row.arm: row for row in standing.rows(MADE)}
    assert [row.arm for row in standing.rows(MADE)] == ["single", "noisy", BASE, "worse"]
    assert found["worse"].difference.mean == pytest.approx(0.01) and found["worse"].difference.low > 0
    assert found[BASE].difference.mean == 0 and found["single"].difference.seeds == 1
    assert found["worse"].token_share == pytest.approx(0.3) and found["worse"].leak["training"] == pytest.approx(0.1)
    assert found["worse"].step_seconds == pytest.approx(101 / 400)
    with pytest.raises(ConfigError, match="has no run of 'LBL, K = 1'"):
        standing.rows(results({"worse": [2.0]}))


def test_noise_of_seeds_and_of_other_recordings():
    """Seeds: pooled over arms, for all comparisons. Elsewhere: the baseline at the same seed, at this scale only."""
    found = standing.rows(MADE)
    d = [1.9 / 2.0 - 1, 2.2 / 2.1 - 1, 0]
    variance = sum((x - sum(d) / 3) ** 2 for x in d) / 4  # two arms of three seeds, of which one does not scatter
    noise = standing.floor(found, MADE)
    assert noise.seeds == pytest.approx(3.4954 * (variance / 3) ** 0.5, rel=1e-4) and noise.elsewhere == ()  # t of 1.25 %, 4
    elsewhere = results({BASE: [2.06]})
    elsewhere["runs"][0]["device"] = "another CPU"
    other_scale = elsewhere | {"scale": "cpu"}
    assert standing.floor(found, MADE, [elsewhere, MADE, other_scale]).elsewhere == pytest.approx((0.03,))
    assert math.isnan(standing.floor(standing.rows(results({BASE: [2.0], "x": [2.1]})), results({BASE: [2.0]})).seeds)


def test_what_a_difference_says():
    found = {row.arm: row for row in standing.rows(MADE)}
    calm, other = standing.Floor(0.01, ()), standing.Floor(0.01, (-0.02,))
    says = {name: standing.verdict(row, calm) for name, row in found.items()}
    assert says["worse"] == "worse" and says["noisy"] == "within noise" and says["single"] == "one seed only"
    assert standing.verdict(found["worse"], other) == "within noise", "another machine makes as much"


def test_words_of_noise_claim_neither_independent_arms_nor_untouched_settings():
    said = " ".join(family_page.noise_in_words(standing.rows(MADE), standing.Floor(0.01, ())))
    assert f"These share the runs of {BASE}, so more often".replace("-", "\u2212") in said
    assert "No arm was tuned" not in said and "no arm's learning rate" in said


def test_the_page_has_table_scatter_and_floor(tmp_path):
    path = tmp_path / "family-quick.json"
    path.write_text(json.dumps(MADE | {"experiment": "family", "figures": ["deviation_by_layer"]}))
    text = write_page([path]).read_text("utf-8")
    page = Page(text)
    assert 'class="sortable"' in text and 'data-key="0.01' in text
    for words in ("Where each arm stands", "+1.00 %", "Noise of seeds", "older code", "chance makes", "Protocol 1"):
        assert words in page.words.replace("\u00a0", " ")
    fig = page.data("data-family-balance-against-loss")
    assert [trace["name"] for trace in fig["data"]] == ["1 single", "2 noisy", f"3 {BASE}", "4 worse"]
    assert fig["data"][3]["error_y"]["array"] and "error_y" not in fig["data"][0]
    heads = [part.count("<th ") for part in text.split("</thead>")[:2]]
    assert heads == [len(family_page.COLUMNS), len(family_page.ASSUMED)] == [11, 7]


def test_the_protocol_is_what_it_was():
    """Another model, text, number of steps or rate is another protocol: raise PROTOCOL, and record the family anew."""
    settings = json.dumps(settings_of(TOP1, lab.scale("cpu"), seed=0), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    assert {PROTOCOL: digest} == {"1": "05a874a637d4"} and TOP1.name == BASE and lab.scale("cpu").seeds == (0, 1, 2)


# ------------------------------------------------------------------------------------------------------- trained arms

MINE = '''
from sigma_lite.balance.balancer import Balancer
from sigma_lite.model import Router

class Idea(Balancer):
    """Flat on average."""
    def loss(self, routing, f_E):
        return len(f_E) * routing.probs.mean(0).square().sum()

class Second(Router):
    def choose(self, scores_TE):
        return scores_TE.topk(self.top_k + 1).indices[:, 1:]

def flat(routing, f_E):
    return len(f_E) * routing.probs.mean(0).square().sum()

VALUE = 3
'''
CHOICE, HASH = ([arm for arm in PAPERS if arm.name == name][0] for name in ("expert choice", "hash routing"))


@pytest.fixture(scope="module")
def recorded(corpus_and_data, tmp_path_factory):
    """A small family of three arms and two seeds, and a stranger's file."""
    import forked

    folder = tmp_path_factory.mktemp("family")
    (folder / "prepared").symlink_to(corpus_and_data / "prepared")
    (folder / "text").symlink_to(corpus_and_data / "text")
    (folder / "a_strangers.py").write_text(MINE)
    experiment = Experiment("family", "?", (TOP1, HASH, CHOICE), (), measure="family", protocol=PROTOCOL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sigma_lite.lab.run._start", forked.start)
        run_experiment(experiment, small.scale(4), runs="runs", results="results", seeds=(0, 1), workers=1)
    return folder


def test_what_was_measured_and_what_is_assumed_agree(recorded):
    """Only expert choice sees the future, and hash routing is all about the token."""
    found = lab.read_results(recorded / "results/family-tiny.json")
    rows = {row.arm: row for row in standing.rows(found)}
    assert found["protocol"] == PROTOCOL
    assert rows[BASE].leak == rows["hash routing"].leak == {"training": 0, "evaluation": 0}
    assert min(rows["expert choice"].leak.values()) > 0 and rows["expert choice"].assumes["causal"] == "no"
    assert rows["hash routing"].token_share > 0.9 > rows[BASE].token_share > 0
    assert rows["hash routing"].assumes["parameters"] == "none, and no router at all"


@pytest.mark.parametrize("name", ["Idea", "Second", "flat"])
def test_a_strangers_ten_lines_stand_somewhere(recorded, monkeypatch, forks, name):
    monkeypatch.chdir(recorded)
    found, made = rank.rank(
        f"a_strangers.py:{name}", small.scale(4), seeds=(0, 1), runs="runs", results="results", workers=1
    )
    arm = f"{name} (a_strangers.py)"
    assert found.row.arm == arm and 1 <= found.place <= found.of == 4 and made == Path(f"results/ranked/{name}-tiny.json")
    assert lab.read_results(made)["protocol"] == PROTOCOL and len(lab.read_results(made)["runs"]) == 4
    assert not set(found.better_than) & set(found.worse_than) and arm in [row.arm for row in found.all_rows]
    said = rank.in_words(found)
    assert "95 % interval" in said and f"place {found.place} of 4" in said and "Protocol 1" in said
    assert arm in Page(write_page([made], rows=found.all_rows).read_text("utf-8")).words


def test_place_and_comparisons_by_hand():
    recorded = lab.results.Results(results({BASE: [2.0, 2.0], "bad": [2.2, 2.202], "good": [1.8, 1.798]}))
    own = results({BASE: [4.0, 4.0], "mine": [4.0, 4.004]})
    found = rank.stands(recorded, own, "mine")
    assert (found.place, found.of) == (3, 4), "behind good and, by 0.05 %, the baseline"
    assert found.better_than == ["bad"] and found.worse_than == ["good"]
    said = rank.in_words(found)
    assert found.away == 1 and "ended +100.0 % from the recorded runs" in said and "the noise of two baselines" in said
    near = rank.stands(recorded, results({BASE: [2.0, 2.0], "mine": [2.0, 2.002]}), "mine")
    assert near.away == 0 and "recorded runs" not in rank.in_words(near)
    close = rank.stands(recorded, results({BASE: [2.0, 2.0], "mine": [2.2015, 2.2016]}), "mine")
    assert not close.better_than, "+10.08 against +10.05 %: clear by the interval alone, and less than seeds make"
    other = results({BASE: [4.0, 4.0], "mine": [4.0, 4.0]})
    for run in other["runs"]:
        run["seed"] += 7
    assert math.isnan(rank.stands(recorded, other, "mine").away), "no seed in common"
    single = rank.stands(recorded, results({BASE: [4.0], "mine": [1.0]}), "mine")
    assert single.place == 1 and not single.better_than, "one seed says nothing"


@pytest.mark.parametrize(
    ("idea", "words"),
    [
        ("a_strangers.py", "give FILE.py:NAME"),
        ("nowhere.py:Idea", "there is no file nowhere.py"),
        ("a_strangers.py:Idae", "has no Idae; did you mean 'Idea'"),
        ("a_strangers.py:VALUE", "it is of type int"),
        ("broken.py:Idea", "cannot be imported: ZeroDivisionError"),
        ("ends.py:Idea", "cannot be imported: SystemExit: 3"),
        ("random.py:choice", "another module is called random"),
        ("__main__.py:Idea", "another module is called __main__"),
    ],
)
def test_an_idea_that_cannot_be_is_refused_before_any_training(recorded, monkeypatch, idea, words):
    monkeypatch.chdir(recorded)
    Path("broken.py").write_text("1 / 0")
    Path("ends.py").write_text("raise SystemExit(3)")
    Path("__main__.py").write_text("Idea = dict")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as the installed command has it
    Path("random.py").write_text("def choice(routing, f): return f.sum()")
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(ConfigError, match=words):
        rank.rank(idea, small.scale(4), runs="runs", results="results")
    assert sorted(Path("runs").rglob("*")) == before


def test_without_a_recorded_family_of_this_protocol_nothing_is_ranked(recorded, monkeypatch, tmp_path):
    monkeypatch.chdir(recorded)
    with pytest.raises(StorageError, match="run `sigma-lite lab run family --scale tiny` first"):
        rank.rank("a_strangers.py:Idea", small.scale(4), results=tmp_path)
    monkeypatch.setattr(rank, "PROTOCOL", "2")
    with pytest.raises(ConfigError, match="follows protocol 1, this code 2"):
        rank.rank("a_strangers.py:Idea", small.scale(4), results="results")


def test_a_leak_is_of_tokens_before_the_changed_one():
    from sigma_lite.model import Parts, Transformer
    from sigma_lite.papers.choice import ExpertChoice

    torch.manual_seed(0)
    from sigma_lite.config import ModelConfig

    net = ModelConfig(vocab_size=50, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8)
    ids = torch.randint(0, 50, (2, 20))
    assert measure.leak(Transformer(net), ids, training=True) == 0
    assert measure.leak(Transformer(net, Parts(router=ExpertChoice)), ids, training=False) > 0


@pytest.mark.slow
def test_every_arm_of_the_family_runs_from_yaml_to_table(place, forks):
    """Four steps each, in workers: what plain loops cannot show of yaml, checkpoints, validation and measures."""
    family = lab.experiment("family")
    path = run_experiment(family, small.scale(4), runs="runs", results="results", seeds=(0,), workers=1)
    found = {row.arm: row for row in standing.rows(lab.read_results(path))}
    assert found.keys() == {arm.name for arm in family.arms}
    for row in found.values():
        causal = row.assumes["causal"]
        assert row.leak["evaluation"] == 0 or causal == "no"
        assert row.leak["training"] == 0 or causal != "yes", row.arm
