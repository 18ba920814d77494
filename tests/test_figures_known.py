"""Figures of what experts know: what is drawn is what `eval` kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sigma_lite.figures import known
from sigma_lite.report.known import known_section

COSTS = {
    "bits_per_byte": 2.0,
    "by": {
        "kind": {
            "text": {"tokens": 10, "bytes": 30, "nats_per_token": 3.0, "bits_per_byte": 1.4},
            "number": {"tokens": 10, "bytes": 10, "nats_per_token": 1.0, "bits_per_byte": 4.0},
            "special": {"tokens": 2, "bytes": 0, "nats_per_token": 5.0},
        },
        "domain": {},
    },
}
ONE = {"bits": 0.5, "chance": 0.1, "p": 0.01, "entropy": 1.0, "sure": 1}
MAP = {
    "names": {"kind": ["special", "text", "number"], "domain": ["code", "prose"]},
    "source": "a text",
    "layers": [
        {
            "kind": {**ONE, "counts": [[0, 30, 10], [0, 0, 0], [0, 10, 30]], "pairs": [[2, 2, 30, 6.0]]},
            "domain": {**ONE, "counts": [[20, 20], [0, 0], [20, 20]], "pairs": []},
        }
    ],
}
WORTH = {"rise": [[0.1, 0.0, 0.3]], "tokens": [[5, 0, 9]], "on_own": [[0.2, None, 1.0]], "agreement_kind": [0.5]}


def test_costs_stand_by_name_and_end_of_text_has_no_bits():
    fig = known.costs(COSTS)
    assert [list(trace.y) for trace in fig.data] == [["text", "number"]] and list(fig.data[0].x) == [1.4, 4.0]
    assert sum(fig.data[0].customdata) == pytest.approx(100 * 40 / 50), "the end of texts is part of the whole"


def test_lift_is_how_much_more_often_than_all_do():
    fig = known.specialised(MAP)
    kinds, domains = fig.data
    assert (kinds.visible, domains.visible) == (True, False)
    assert list(kinds.y) == ["text", "number"], "labels that no token has are left out"
    experts = [cell[0] for cell in kinds.customdata[0]]
    assert sorted(experts) == [0, 2], "and experts without a token"
    lift = {(name, e): z for name, row in zip(kinds.y, kinds.z, strict=True) for e, z in zip(experts, row, strict=True)}
    assert lift["text", 0] == pytest.approx(math.log2(0.75 / 0.5)) and lift["number", 0] == pytest.approx(-1)
    assert [list(row) for row in kinds.text] == [["", ""], ["", "●"] if experts == [0, 2] else ["●", ""]]
    assert np.allclose(domains.z, 0)
    buttons = fig.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["layer 0, kinds", "layer 0, domains"]
    assert buttons[1].args[0]["visible"] == [False, True]


def test_information_is_a_share_of_what_could_be_known():
    fig = known.information(MAP)
    assert [list(trace.y) for trace in fig.data] == [[50], [10], [50], [10]]


def test_worth_is_sorted_and_keeps_its_experts():
    (line,) = known.worth(WORTH).data
    assert list(line.y) == [0.3, 0.1, 0.0] and [cell[0] for cell in line.customdata] == [2, 0, 1]
    assert line.customdata[2][2] == "none of its own"


@pytest.mark.parametrize("draw", [known.costs, known.specialised, known.information, known.worth])
def test_what_was_not_evaluated_says_how_to(draw):
    assert "sigma-lite eval RUN" in draw({}).layout.annotations[0].text


def test_of_each_task_the_latest_result_counts():
    entries = [{"kind": "eval", "step": step, "task": "add2", "rows": 9, "exact_match": step / 10} for step in (1, 2)]
    (section,) = known_section(entries)
    assert "0.2000" in section.parts[0] and "0.1000" not in section.parts[0]
    assert known_section([]) == []
