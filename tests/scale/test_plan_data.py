"""What the planner says of a ramp and of a mixture: tokens, hours and passes are those of the steps that will be made."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import tiny

from sigma_lite import cli
from sigma_lite.config import ConfigError, RowsConfig
from sigma_lite.data.mixture import load_mixture
from sigma_lite.data.order import Order
from sigma_lite.runfile import load_run
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.table import as_table

RAMP = {"data__rows__ramp": [[0, 4], [3, 8]], "data__rows__per_micro": 2}


def test_a_ramp_is_read_and_waited_for_step_by_step(tmp_path):
    """Tokens are those of all steps; hours lie between those of the small and of the large batch, by their steps."""
    ramped = load_run([tiny.write_config(tmp_path, **RAMP)])
    found = forecast(ramped)["run"]
    assert found["tokens"] == 32 * (3 * 4 + 9 * 8)
    each = {}
    for size in (4, 8):
        rows = RowsConfig(length=32, per_step=size, per_micro=2)
        each[size] = [forecast(dataclasses.replace(ramped, rows=rows, trainer={**ramped.trainer, "max_steps": n}))["run"]
                      for n in (3, 12)]  # fmt: skip
    for level, hours in enumerate(found["hours"]):
        wanted = each[4][0]["hours"][level] + each[8][1]["hours"][level] - each[8][0]["hours"][level]
        assert hours == pytest.approx(wanted) and hours < each[8][1]["hours"][level]


def test_a_size_that_devices_cannot_share_out_is_refused(tmp_path):
    strategy = {"class_path": "sigma_lite.scale.strategy.ExpertParallel"}
    run = load_run([tiny.write_config(tmp_path, **RAMP, trainer__strategy=strategy, trainer__devices=4)])
    problem = forecast(run, "h100-node")["layout"]["problem"]
    assert problem == "rows.ramp's 4 does not divide into 4 devices x per_micro=2"
    three = load_run([tiny.write_config(tmp_path, **RAMP, trainer__strategy=strategy, trainer__devices=3)])
    with pytest.raises(ConfigError, match="no layout of"):
        forecast(three, "h100-node")


def test_passes_of_a_mixture_are_those_that_the_steps_will_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_corpus(tmp_path)
    (tmp_path / "prose").mkdir()
    for n in range(12):
        (tmp_path / f"prose/p{n}.txt").write_text("".join(f"Chapter {n} says {i} things.\n" for i in range(15)))
    sources = {"code": {"source": "files", "path": "text"}, "prose": {"source": "files", "path": "prose"}}
    mixture = {
        "sources": sources,
        "weights": {"code": 3, "prose": 1},
        "stages": [{"at_step": 20, "weights": {"code": 0, "prose": 1}}],
    }
    config = tiny.write_config(tmp_path, **RAMP, data__corpus={"dir": "mix", "heldout": 0.2}, data__mixture=mixture,
                               trainer__max_steps=40)  # fmt: skip
    run = load_run([config])
    assert "sources" not in forecast(run)["data"] and forecast(run)["data"]["disk_bytes"] == 3 * 32 * (12 + 37 * 8)
    cli.main(["prepare", "-c", str(config)])
    prepared, facts = load_mixture(run.corpus, run.mixture), forecast(run)
    sizes = [(len(s.train) - 1) // 32 for s in prepared.sources.values()]
    order = Order(sizes, run.rows, run.mixture.shares(prepared.tokens))
    for place, source in enumerate(facts["data"]["sources"].values()):
        assert source["tokens_read"] == pytest.approx(32 * order.taken(40)[place], abs=32 * 2)
        assert source["passes"] == pytest.approx(order.passes(40)[place], rel=0.05)
    assert sum(s["tokens_read"] for s in facts["data"]["sources"].values()) == facts["run"]["tokens"]
    table = as_table(facts).splitlines()
    for name, source in facts["data"]["sources"].items():
        assert any(line.split()[0] == name and f"{source['passes']:.2g} passes over it" in line for line in table if line)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(order.stages))
