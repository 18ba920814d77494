"""Figures of chapters 19 and 20 draw what the package computes; processes that stand for machines answer, or say why not."""

from __future__ import annotations

import json
import operator
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch

from sigma_lite.config import ConfigError
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.layout import Layout
from sigma_lite.scale.memory import GIB, memory
from sigma_lite.scale.plan import k_before_and_after
from sigma_lite.teach import plots_scale
from sigma_lite.teach.ranks import Ranks

RESULTS = Path(__file__).parents[2] / "results"


def test_send_matrix_of_the_picture():
    ids_TK = torch.tensor([0, 2, 2, 5, 2, 3, 3, 7])[:, None]
    sends_RR = plots_scale.send_matrix(ids_TK, 4, 8)
    assert sends_RR.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 2, 0, 0], [0, 1, 0, 1]]
    assert plots_scale.traffic(sends_RR, "").data[0].z[2][1] == 2, "sender down, receiver across"


def test_every_choice_is_sent_once():
    ids_TK = torch.rand(24, 12, generator=torch.Generator().manual_seed(0)).topk(3).indices
    sends_RR = plots_scale.send_matrix(ids_TK, 4, 12)
    assert sends_RR.sum(1).tolist() == [18] * 4
    assert sends_RR.sum(0).tolist() == torch.bincount(ids_TK.flatten() // 3, minlength=4).tolist()
    with pytest.raises(ConfigError, match="cannot be shared out over 5 ranks"):
        plots_scale.send_matrix(ids_TK, 5, 12)


@pytest.mark.parametrize("imbalance", [0, 0.5, 2, 8])
def test_makespan_grows_with_ranks_and_ends_at_the_busiest_expert(imbalance):
    f_E = plots_scale.tilted(imbalance)
    spans = [plots_scale.makespan(f_E, ranks) for ranks in (1, 2, 4, 8, 16, 32)]
    assert spans[0] == pytest.approx(1) and spans[-1] == pytest.approx(1 + imbalance, rel=0.01)
    assert all(a <= b + 1e-9 for a, b in zip(spans, spans[1:], strict=False)), "halves of a rank are never both below it"


def test_rivals_of_eplb_are_drawn_as_recorded_and_the_chapter_says_what_they_show():
    """Snake is 1 to 3 % behind EPLB on the window of the plan, in an eighth of its time; on the next, age counts."""
    kept = json.loads((RESULTS / "bench" / "placement-x86_64-2cpu.json").read_text("utf-8"))
    figure, stages = plots_scale.rivals(kept), ("before the switch", "after it")
    for trace in figure.data:
        scores = kept["staleness"][trace.name]
        assert [y for y in trace.y if y] == [scores[stage][on] for stage in stages for on in ("same window", "next")]
        assert trace.x[0] < kept["planning_ms"][trace.name] < trace.x[3]
    ms, scores = kept["planning_ms"], kept["staleness"]
    assert len(figure.data) == len(ms) == len(scores) == 7 and 7 < ms["EPLB, global"] / ms["snake"] < 9
    for stage in stages:
        greedy, snake, none = (scores[name][stage] for name in ("EPLB, global", "snake", "where stored"))
        assert 1.009 < snake["same window"] / greedy["same window"] < 1.03
        packing = [scores[name][stage]["next"] for name in ms if name not in ("where stored", "replicate only")]
        assert max(packing) / min(packing) < 1.02 and min(packing) > 1.1 and none["next"] > 1.2 * max(packing)
    found, genes = kept["search"]["search by ranks"]["program"], ("replicate", "pack", "swaps", "forget")
    assert [found[gene] for gene in genes] == ["greedy", "snake", 0, 0]


def test_bars_of_the_planner_are_the_memory_of_a_device():
    run, cluster = plots_scale.rung("sigma_moe_tiny"), load_cluster("h100-node").resized(8)
    figure = plots_scale.planner(run, cluster, 8, 16, True)
    layout = Layout(64, 8, 16, recompute=True, sharded=True)
    for stage, k in enumerate(k_before_and_after(run)):
        items = memory(run, layout, cluster, k)
        assert [bar.y[stage] for bar in figure.data] == pytest.approx([size / GIB for size in items.values()])
    assert "fits" in figure.layout.title.text
    assert "DOES NOT FIT" in plots_scale.planner(run, cluster, 8, 16, False).layout.title.text
    assert "not possible" in plots_scale.planner(run, cluster, 64, 16, True).layout.title.text


def test_more_nodes_divide_computing():
    run, cluster = plots_scale.rung("sigma_moe_tiny"), load_cluster("h100-node")
    layout = lambda c: Layout(c.devices, 8, 1024 // c.devices, recompute=True, sharded=True)  # noqa: E731
    curves = {trace.name: trace.y for trace in plots_scale.over_nodes(run, cluster, [8, 16], layout).data}
    assert curves["compute"][0] == pytest.approx(2 * curves["compute"][1])


def test_every_rung_says_what_it_is_for():
    for name in ("toy", "laptop", "gpu_24gb", "gpu_80gb", "node_8gpu", "sigma_moe_tiny"):
        assert {"Question", "Hardware", "Memory", "Time"} <= plots_scale.question(name).keys()


def test_published_rows_are_drawn_with_the_laws_range():
    rows = plots_scale.published()
    bars, dots = plots_scale.published_figure(rows).data
    assert len(rows) == len(bars.x) == len(dots.x) >= 4
    assert all(low + width == pytest.approx(row["fast"]) for low, width, row in zip(bars.base, bars.x, rows, strict=True))


def test_a_function_of_the_notebook_is_refused():
    ranks = Ranks.__new__(Ranks)  # without its processes: the rule comes first
    work = lambda rank: rank  # noqa: E731
    work.__module__ = "__main__"
    with pytest.raises(ConfigError, match="put it into a module"):
        ranks.run(work)


@pytest.mark.slow
def test_ranks_answer_in_order_and_say_what_went_wrong():
    ranks = Ranks(2)
    assert ranks.run(operator.add, 10) == [10, 11]
    with pytest.raises(RuntimeError, match=r"rank 0 failed:(.|\n)*ZeroDivisionError"):
        ranks.run(operator.pow, -1)  # 0 ** -1 on rank 0; 1 ** -1 is well on rank 1
    assert len(ranks) == 0, "the others are ended too"
    with pytest.raises(ConfigError, match="start new ones"):
        ranks.run(divmod, 1)


@pytest.mark.slow
def test_silence_has_an_end(monkeypatch):
    ranks, wait = Ranks(2), connection.wait
    monkeypatch.setattr(connection, "wait", lambda pipes, timeout: wait(pipes, timeout if len(pipes) == 1 else None))
    ranks.timeout_s = 1  # of the second: for the first we wait as long as it takes
    with pytest.raises(RuntimeError, match=r"rank\(s\) \[1\] did not answer within 1 s"):
        ranks.run(only_the_second_waits, 600)


def only_the_second_waits(rank, seconds):
    time.sleep(rank * seconds)
