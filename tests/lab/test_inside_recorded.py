"""What three seeds of the family's routers recorded: results/bench/inside-family.json, of benchmarks/inside_family.py."""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from sigma_lite.lab.family import BASE
from sigma_lite.lab.results import read_results
from sigma_lite.lab.seeds import interval, paired

RESULTS = Path(__file__).parents[2] / "results"
FACTS = json.loads((RESULTS / "bench" / "inside-family.json").read_bytes())
RUNS = {arm: [run for run in FACTS["runs"] if run["arm"] == arm] for arm in {run["arm"] for run in FACTS["runs"]}}
NULLS, GROUPED, SIMBAL = "null experts, K = 2 of 96 + 96", "grouped experts, K = 4 in 4 groups", "SimBal"
SHINKA, MUTUAL, FREE, E = "ShinkaEvolve's LBL", "mutual information", "K = 4 of 96", 96


def over(arm: str, part: str, name: str) -> list[float]:
    """Mean over layers, one of each seed."""
    return [mean(run[part][name]) for run in RUNS[arm]]


def working(kind: str) -> list[float]:
    """True experts of a token of this kind, mean over layers."""
    return [mean(row[FACTS["kinds"].index(kind)] for row in run["by_kind"]) for run in RUNS[NULLS]]


def differences(ones: list[float], others: list[float]) -> tuple[float, float]:
    return interval([one - other for one, other in zip(ones, others, strict=True)])


def test_three_seeds_of_each_and_no_path_of_a_machine():
    assert {arm: [run["seed"] for run in runs] for arm, runs in RUNS.items()} == {arm: [0, 1, 2] for arm in RUNS}
    assert {BASE, "nothing", "frozen router", NULLS, GROUPED, FREE, SIMBAL, SHINKA, MUTUAL} <= RUNS.keys()
    assert "/" not in FACTS["command"].replace("benchmarks/inside_family.py", "")


def test_the_runs_are_those_of_the_familys_table():
    family = {(run["arm"], run["seed"]): run for run in read_results(RESULTS / "lab" / "family-cpu.json")["runs"]}
    for run in FACTS["runs"]:
        table = family[run["arm"], run["seed"]]
        assert (run["bits_per_byte"], run["time"]) == (table["heldout"]["bits_per_byte"], table["time"])
        assert run["entropy"]["max"] == pytest.approx(table["heldout"]["max"], rel=0.2, abs=0.02), (
            "1 % of the rows is left out"
        )


# ------------------------------------------------------------------------------------------------------------- null experts


def test_white_space_uses_half_the_experts_of_names():
    middle, half = differences(working("identifier"), working("whitespace"))
    assert max(working("whitespace")) < 0.71 and min(working("identifier")) > 1.19
    assert (middle, half) == pytest.approx((0.557, 0.039), abs=0.001)


def test_operators_do_not_clearly_use_fewer_than_names():
    middle, half = differences(working("identifier"), working("operator"))
    assert 0 < middle < half


def test_the_load_is_somewhat_above_its_law():
    experts = [mean(run["experts"]) for run in RUNS[NULLS]]
    law, (middle, half) = 2 * 96 / (96 + 96), interval(experts)
    assert law == 1 < middle - half and middle == pytest.approx(1.087, abs=0.001)
    none, one, two = (mean(mean(row[k] for row in run["working"]) for run in RUNS[NULLS]) for k in range(3))
    assert (none, one, two) == pytest.approx((0.263, 0.387, 0.350), abs=0.002)


def test_null_experts_cost_more_and_are_no_better():
    """FLOPs of a token, forward: one expert, null experts, four experts."""
    flops = [mean(run["flops"] for run in RUNS[arm]) for arm in (BASE, NULLS, GROUPED)]
    assert flops[1] / flops[0] == pytest.approx(1.12, abs=0.003) and flops[2] / flops[0] == pytest.approx(1.479, abs=0.001)
    pairs = [(one["bits_per_byte"], other["bits_per_byte"]) for one, other in zip(RUNS[NULLS], RUNS[BASE], strict=True)]
    assert min(one / other - 1 for one, other in pairs) > 0.04
    assert paired(results(), GROUPED, BASE, lambda run: run["bits_per_byte"]).high < 0


def results() -> dict:
    return {"experiment": "inside", "arms": RUNS, "runs": FACTS["runs"]}


# ------------------------------------------------------------------------------------------------------------------ devices


def test_groups_are_even_and_without_them_the_busiest_device_has_a_tenth_more():
    """In batches of 4096 tokens, as a step has; at one expert per token."""
    for when in ("step", "whole"):
        assert max(max(run["busiest_device"][when]) for run in RUNS[GROUPED]) == 0
    middle, half = interval(over(BASE, "busiest_device", "step"))
    assert (middle, half) == pytest.approx((0.0885, 0.022), abs=0.0005)


def test_four_free_experts_waste_little_and_four_grouped_ones_cost_little():
    assert interval(over(FREE, "busiest_device", "step")) == pytest.approx((0.064, 0.013), abs=0.001)
    assert interval(over(FREE, "busiest_device", "whole")) == pytest.approx((0.051, 0.020), abs=0.001)
    cost = paired(results(), GROUPED, FREE, lambda run: run["bits_per_byte"])
    assert cost.low > 0 and cost.mean == pytest.approx(0.007, abs=0.0005)


# ----------------------------------------------------------------------------------------------------- ShinkaEvolve's hinge


def test_the_listed_threshold_is_within_chance_of_a_step_and_the_printed_one_is_not():
    chance = FACTS["by_chance"]
    assert chance["listing"]["steps"] == pytest.approx(0.49, abs=0.03) and chance["printed"]["steps"] == 0


def test_under_the_lbl_the_listed_hinge_would_act_in_every_step():
    assert [run["hinge"]["active"] for run in RUNS[BASE]] == [0, 0, 0], "and the LBL has none"
    assert min(min(run["starved"]["listing"]["steps"]) for run in RUNS[BASE]) == 1
    assert interval([mean(run["starved"]["listing"]["experts"]) for run in RUNS[BASE]]) == pytest.approx(
        (19.6, 0.2), abs=0.1
    )
    printed = [mean(run["starved"]["printed"]["steps"]) for run in RUNS[BASE]]
    assert min(printed) > 0.05 and max(printed) < 0.4


def test_its_own_arm_is_starved_as_often_and_its_hinge_acts_in_every_step():
    """Windows of 200k tokens in which some expert is below the threshold, of 16, mean over layers; the hinge's size."""
    assert [run["hinge"]["active"] for run in RUNS[SHINKA]] == [1, 1, 1]
    tenths = [run["hinge"]["tenths"] for run in RUNS[SHINKA]]
    assert all(0.023 < each[0] < 0.025 and 0.002 <= each[-1] < 0.0023 for each in tenths)
    below = {
        (arm, name): [16 * mean(run["windows"][name]["windows"]) for run in RUNS[arm]]
        for arm in (SHINKA, BASE)
        for name in ("listing", "printed")
    }
    assert min(below[SHINKA, "listing"] + below[BASE, "listing"]) > 15.8
    assert max(below[SHINKA, "printed"] + below[BASE, "printed"]) < 3
    least, of_lbl = over(SHINKA, "entropy", "min"), over(BASE, "entropy", "min")
    assert (mean(least), mean(of_lbl)) == pytest.approx((-0.80, -0.79), abs=0.005)
    middle, half = differences(least, of_lbl)
    assert abs(middle) < half


# ------------------------------------------------------------------------------------------------------- mutual information


def test_mutual_information_makes_tokens_sure_and_the_mean_uneven():
    """Nats; log 96 is 4.56."""
    assert interval(over(MUTUAL, "entropy", "token")) == pytest.approx((0.392, 0.054), abs=0.001)
    assert interval(over(MUTUAL, "entropy", "mean")) == pytest.approx((3.647, 0.085), abs=0.001)
    assert (mean(over(BASE, "entropy", "token")), mean(over(BASE, "entropy", "mean"))) == pytest.approx(
        (4.24, 4.52), abs=0.005
    )
    assert max(over(MUTUAL, "entropy", "mean")) < math.log(E) - 0.8
    idle = {arm: [sum(run["entropy"]["dead"]) for run in RUNS[arm]] for arm in (MUTUAL, BASE)}
    assert idle == {MUTUAL: [164, 143, 175], BASE: [0, 0, 0]}
    gain = paired(results(), MUTUAL, BASE, lambda run: run["bits_per_byte"])
    assert gain.high < 0 and gain.mean == pytest.approx(-0.011, abs=0.001)


# ------------------------------------------------------------------------------------------------------------- similar rows


def test_rows_are_most_similar_without_a_loss():
    """Mean size of the cosine of two rows: by chance .1 in 64 dimensions."""
    size = {arm: interval(over(arm, "rows", "size")) for arm in (BASE, "nothing", "frozen router", GROUPED)}
    assert size["frozen router"] == pytest.approx((0.0999, 0.0009), abs=0.0002)
    assert size[BASE] == pytest.approx((0.247, 0.027), abs=0.001) and size[GROUPED][0] == pytest.approx(0.171, abs=0.001)
    assert size["nothing"] == pytest.approx((0.941, 0.008), abs=0.001)


def test_similarity_hardly_explains_loads_under_the_lbl():
    """Rank correlations over the 96 experts of a layer: clear, and of 1 or 2 % of the variance."""
    for name, expected in (("by_cosine", -0.10), ("by_nearest", -0.13)):
        middle, half = interval(over(BASE, "rows", name))
        assert middle + half < 0 and middle == pytest.approx(expected, abs=0.005)
    norm, half = interval(over(BASE, "rows", "by_norm"))
    assert norm - half < 0 < norm
    assert interval(over("nothing", "rows", "by_cosine"))[0] == pytest.approx(-0.48, abs=0.005)
    assert interval(over("frozen router", "rows", "by_norm"))[0] == pytest.approx(0.44, abs=0.005)


def test_simbal_shortens_half_of_its_rows_and_these_have_no_tokens():
    size, length = interval(over(SIMBAL, "rows", "size")), interval(over(SIMBAL, "rows", "by_norm"))
    assert size[0] == pytest.approx(0.040, abs=0.001) and length == pytest.approx((0.834, 0.014), abs=0.001)
    assert min(over(SIMBAL, "rows", "short")) > 40 and max(over(SIMBAL, "rows", "short_load")) < 0.01
    assert max(over(BASE, "rows", "short")) == 0


# ------------------------------------------------------------------------- what other records say of the same questions


def test_dear_experts_get_their_40_percent_in_training():
    """Shift experts cost 4 where full ones cost 6; the first half of the experts is full."""
    family = read_results(RESULTS / "lab" / "family-cpu.json")["runs"]
    runs = [run for run in family if run["arm"] == "shift experts, balanced by cost"]
    full = [mean(sum(f[: E // 2]) for f in run["heldout"]["f"]) for run in runs]
    assert interval(full) == pytest.approx((0.411, 0.010), abs=0.001)
    makespan = mean(mean(max(6 * sum(f[: E // 2]), 4 * sum(f[E // 2 :])) for f in run["heldout"]["f"]) for run in runs)
    assert makespan / 3 - 1 == pytest.approx(-0.17, abs=0.01), "3 where both kinds get half"


def test_experts_know_domains_the_better_the_more_domains_the_load_is_counted_over():
    """Nats of a token's domain that its expert tells, mean over layers; three seeds an arm."""
    arms: dict = defaultdict(list)
    for run in read_results(RESULTS / "lab" / "global-cpu.json")["runs"]:
        arms[run["arm"]].append(run)
    told = {arm: interval([mean(run["measured"]["information"]) for run in runs]) for arm, runs in arms.items()}
    known = {"micro": (0.101, 0.004), "buffer": (0.184, 0.007), "global": (0.414, 0.060), "shuffle": (0.409, 0.029)}
    for arm, value in known.items():
        assert told[arm] == pytest.approx(value, abs=0.001)
    apart = {arm: interval([mean(map(specialised, run["measured"]["f"])) for run in runs]) for arm, runs in arms.items()}
    wanted = {"micro": (0.171, 0.004), "buffer": (0.237, 0.005), "global": (0.37, 0.03), "shuffle": (0.37, 0.02)}
    for arm, value in wanted.items():
        assert apart[arm] == pytest.approx(value, abs=0.005)


def specialised(f_DE: list) -> float:
    """Chapter 7's measure: tokens of a domain that would have to change their expert for it to look like the mean."""
    f = np.array(f_DE)
    return np.abs(f - f.mean(0)).sum(1).mean() / 2


def test_no_loss_of_a_domain_experiment_is_clearly_lower():
    results = read_results(RESULTS / "lab" / "global-cpu.json")
    known = {"global": (-1.8, 6.7), "shuffle": (-2.0, 10.6), "buffer": (-1.2, 5.0)}
    for arm, (percent, half) in known.items():
        found = paired(results, arm, "micro")
        ends = (percent - half, percent + half)
        assert (100 * found.low, 100 * found.high) == pytest.approx(ends, abs=0.1) and not found.is_clear
