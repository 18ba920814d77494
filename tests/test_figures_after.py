"""Figures of what came after pretraining: what is drawn is what the diary and `eval` kept."""

from __future__ import annotations

import pytest

from sigma_lite.figures import after
from sigma_lite.report.after import after_section
from sigma_lite.report.known import known_section

REWARDS = {"reward": 0.25, "length": 20.0, "dead": 0.5, "entropy": 0.3, "ended": 1.0}
STEPS = [{"kind": "step", "step": n, "rewards": {**REWARDS, "reward": n / 10}} for n in (1, 2, 3)]
DRIFT = {
    "kind": "eval",
    "step": 9,
    "task": "drift",
    "rows": 5,
    "against": "runs/toy",
    "against_step": 1200,
    "changed_text": [0.5, 0.25],
    "changed_old_routers_text": [0.25, 0.0],
    "unused_text": {"before": [1, 2], "now": [3, 4]},
    "changed_problems": [1.0, 0.75],
    "changed_old_routers_problems": [0.5, 0.5],
    "unused_problems": {"before": [5, 6], "now": [7, 8]},
    "bits_per_byte_text": {"before": 1.5, "now": 2.25},
    "label_bits_problems": {"before": [0.5, 0.25], "now": [1.0, 1.25]},
}


def test_rewards_stand_step_by_step():
    fig = after.rewards(STEPS)
    assert list(fig.data[0].x) == [1, 2, 3] and fig.data[0].y == pytest.approx([0.1, 0.2, 0.3])
    assert len(fig.data) == 2 * len(after.ROWS) and fig.data[4].y == pytest.approx([0.5] * 3)


def test_drift_is_in_percent_and_pale_with_earlier_routers():
    bars = after.drift(DRIFT).data
    assert [list(bar.y) for bar in bars] == [[50, 25], [25, 0], [100, 75], [50, 50]]
    assert "earlier routers" in bars[1].name and "problems" in bars[2].name


def test_unused_experts_before_and_now():
    assert [list(bar.y) for bar in after.unused(DRIFT).data] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    of_text = {name: value for name, value in DRIFT.items() if "problems" not in name}
    assert len(after.unused(of_text).data) == 2, "a tokenizer without marks has no problems"


@pytest.mark.parametrize("draw", [after.drift, after.unused])
def test_what_was_not_compared_says_how_to(draw):
    assert "drift --against" in draw({}).layout.annotations[0].text
    assert "no step of rewards" in after.rewards([]).layout.annotations[0].text


def test_the_section_is_there_where_there_is_something_to_say():
    assert after_section([{"kind": "step", "step": 1}]) == [] == known_section([DRIFT])
    (section,) = after_section([*STEPS, DRIFT])
    plot, pair, table = section.parts
    assert plot.name == "rewards" and [p.name for p in pair] == ["drift", "unused"]
    assert "2.2500" in table and "1.00 1.25" in table and "runs/toy" in table
