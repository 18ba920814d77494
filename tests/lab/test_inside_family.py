"""benchmarks/inside_family.py: its formulas against loops, and that a run is opened once, read only, and found again."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import small
import torch

from sigma_lite import lab
from sigma_lite.balance.metrics import entropy
from sigma_lite.data.kinds import IDENTIFIER, KINDS, OPERATOR
from sigma_lite.lab import Arm, Experiment
from sigma_lite.lab.family import BASE
from sigma_lite.model import Routing
from sigma_lite.papers.moge import device_loads

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inside_family

    return inside_family


@pytest.fixture
def routed(bench):
    return bench.routed


def a_routing(T: int = 40, E: int = 8, K: int = 2, seed: int = 0, nulls: int = 0) -> Routing:
    logits = torch.randn(T, E + nulls, generator=torch.Generator().manual_seed(seed))
    probs, ids = logits.softmax(-1), logits.topk(K).indices
    return Routing(probs, ids.where(ids < E, -1), probs.gather(1, ids), logits)


def test_who_works_for_which_kind(routed):
    kinds, ids = torch.tensor([OPERATOR, IDENTIFIER, OPERATOR]), torch.tensor([[3, -1], [1, 2], [-1, -1]])
    table = routed.working(kinds, ids)
    assert table.shape == (len(KINDS), 3) and table.sum() == 3
    assert table[OPERATOR].tolist() == [1, 1, 0] and table[IDENTIFIER].tolist() == [0, 0, 1]
    assert routed.mean_working(table)[OPERATOR] == 0.5 and routed.mean_working(table).sum() == 2.5
    assert routed.mean_working(table.sum(0)) == 1


def test_batches_joined_are_the_batches_routed_as_one(routed):
    """Also where one batch has tokens with more experts than any of the other."""
    one, two = a_routing(seed=1, nulls=4), a_routing(seed=2, nulls=4, K=3)
    kinds = torch.arange(40) % len(KINDS)
    both = routed.joined([routed.of(kinds, r, 8, 4) for r in (one, two)])
    assert both.counts_NE.sum(0).tolist() == [sum((r.ids == e).sum().item() for r in (one, two)) for e in range(8)]
    assert both.devices_NM.tolist() == [device_loads(r.ids, 8, 4).tolist() for r in (one, two)]
    probs, logits = torch.cat([one.probs, two.probs]), torch.cat([one.logits, two.logits])
    torch.testing.assert_close(both.P_C, probs.double().mean(0))
    torch.testing.assert_close(both.logits_C, logits.double().mean(0))
    assert both.entropy == pytest.approx(entropy(probs).mean().item(), rel=1e-6)
    assert both.working_GK.shape == (len(KINDS), 4) and both.working_GK.sum() == 80
    assert routed.mean_working(both.working_GK.sum(0)) == pytest.approx(
        sum((r.ids >= 0).sum().item() for r in (one, two)) / 80
    )


def test_busiest_devices_and_starved_experts_are_those_of_a_loop(routed):
    devices = torch.tensor([[4, 4, 0, 0], [2, 2, 2, 2]])
    assert routed.busiest(devices) == pytest.approx({"step": (1.0 + 0.0) / 2, "whole": 4 * 6 / 16 - 1})
    counts, threshold = torch.randint(0, 20, (6, 8), generator=torch.Generator().manual_seed(0)), 0.64
    counts[0] = 10  # an even batch, in which nobody is starved
    steps, below, missing = [], [], []
    for row in counts.tolist():
        f = [count / sum(row) for count in row]
        short = [threshold / 8 - share for share in f if share < threshold / 8]
        steps.append(bool(short))
        below.append(len(short))
        missing.append(sum(short))
    found = routed.starved(counts, threshold)
    assert found == pytest.approx({"steps": 5 / 6, "experts": sum(below) / 6, "missing": sum(missing) / 6}, rel=1e-5)
    assert sum(steps) == 5, "both cases are there"


def test_chance_alone_starves_some_expert_in_small_batches(routed):
    few, many = routed.by_chance(8, 64, 300), routed.by_chance(8, 4096, 300)
    assert few["listing"]["steps"] > 0.5 and many["listing"]["steps"] == 0


def test_windows_count_starved_experts_layer_by_layer(routed):
    even, uneven = [0.25] * 4, [0.49, 0.49, 0.01, 0.01]  # of an even load: .04, below both thresholds
    found = routed.starved_windows([[even, uneven], [even, even], [uneven, uneven]])
    for name in ("printed", "listing"):
        assert found[name] == {
            "windows": pytest.approx([1 / 3, 2 / 3], rel=1e-4),
            "experts": pytest.approx([2 / 3, 4 / 3], rel=1e-4),
            "last": [2, 2],
        }
    assert routed.starved_windows([[[0.4, 0.4, 0.1, 0.1]]])["printed"]["last"] == [0], "0.4 of an even load: listing only"


def test_the_hinge_is_what_a_step_adds_to_the_lbl(routed):
    steps = [{"kind": "step", "terms": {"balance": 1.0 + added}, "lbl": 1.0} for added in (0, 0, 0.01, 0.03)]
    found = routed.hinge([{"kind": "load"}, *steps])
    assert found == {"active": 0.5, "tenths": [0.0, 0.0, 0.01, 0.03]}


def test_entropies_are_closed_forms(routed):
    """Two sure tokens of two experts: the mean routing has log 2, a token 0, the loads log 2."""
    probs = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    layer = routed.of(torch.zeros(2, dtype=torch.int64), Routing(probs, torch.tensor([[0], [1]]), probs, probs), 4, 2)
    found = routed.entropies(layer, 4)
    assert found == pytest.approx({"mean": 0.693147, "token": 0, "load": 0.693147, "dead": 2, "max": 1, "min": -1}, abs=1e-5)


def test_rows_and_loads_are_those_of_a_loop(routed):
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[2] /= 4
    routing = a_routing(T=400)
    layer = routed.of(torch.zeros(400, dtype=torch.int64), routing, 8, 4)
    found, means, nearest, sizes = routed.rows_and_loads(rows, layer), [], [], []
    for i in range(8):
        cosines = [float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()) for j in range(8) if j != i]
        means.append(sum(cosines) / 7)
        nearest.append(max(cosines))
        sizes.append(sum(map(abs, cosines)) / 7)
    said = {"cosine": sum(means) / 8, "nearest": sum(nearest) / 8, "size": sum(sizes) / 8}
    assert {name: found[name] for name in said} == pytest.approx(said, abs=1e-6)
    loads = [(routing.ids == e).sum().item() for e in range(8)]
    norms = rows.norm(dim=1).tolist()
    short = [e for e in range(8) if norms[e] < max(norms) / 3]
    assert 0 < len(short) == found["short"] and found["short_load"] == pytest.approx(sum(loads[e] for e in short) / 800)
    logits = routing.logits.mean(0).tolist()
    for name, values in {"cosine": means, "nearest": nearest, "norm": norms, "logit": logits}.items():
        assert found[f"by_{name}"] == pytest.approx(statistics.correlation(ranks(values), ranks(loads)), abs=1e-5)
    assert len(set(ranks(nearest))) < 8, "two rows that are nearest to each other share a rank"


def ranks(values: list[float]) -> list[float]:
    """1 .. n; equal ones, up to rounding, share the mean of theirs."""
    values = [round(value, 6) for value in values]
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@pytest.fixture
def runs(table3, tmp_path, monkeypatch) -> Path:
    """A lab's folder with a finished run of BASE at the tiny scale; its text lies elsewhere."""
    shutil.copytree(table3, tmp_path, dirs_exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "prepared").rename(tmp_path / "elsewhere" / "prepared")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "scale", lambda name: small.scale())
    monkeypatch.setattr(lab, "experiment", lambda name: Experiment(name, "?", (Arm(BASE, ""),)))
    return tmp_path / "runs"


def test_a_run_is_opened_once_only_read_and_opened_again_if_it_was_trained_anew(bench, runs, tmp_path, monkeypatch):
    out, files = tmp_path / "inside.json", {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    command = [str(runs), "--data", "elsewhere", "--arms", BASE, "--out", str(out)]
    bench.main(command)
    facts = json.loads(out.read_text())
    (entry,) = facts["runs"]
    batch = 8 * 32
    assert entry["tokens"] % batch == 0 < entry["tokens"] and sum(entry["kind_tokens"]) == entry["tokens"]
    assert (entry["arm"], entry["seed"], entry["experts"]) == (BASE, 0, [1.0, 1.0]) and entry["hinge"]["active"] == 0
    assert all(len(column) == 2 for column in entry["rows"].values()) and str(tmp_path) not in out.read_text()
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == files

    opened = []
    monkeypatch.setattr(bench, "inside", lambda run, data: opened.append(run.seed) or {})
    bench.main(command)
    assert not opened and json.loads(out.read_text()) == facts
    facts["runs"][0]["time"] = "another start"
    out.write_text(json.dumps(facts))
    bench.main(command)
    assert opened == [0]
