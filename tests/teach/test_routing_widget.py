"""The routing explorer's widget: both faces draw what the model chose."""

from __future__ import annotations

import json

import pytest

from sigma_lite.serve.trained import Trained
from sigma_lite.teach import RoutingExplorer
from sigma_lite.teach.plots_routing import busiest, expert_colour, routed_text

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def widget(finished, monkeypatch) -> RoutingExplorer:
    monkeypatch.chdir(finished)
    return RoutingExplorer(Trained("run"), "def rule(x):\n    return x\n", tokens=500)


def test_both_faces_show_every_layer(widget):
    bundle = widget._repr_mimebundle_()
    json.dumps(bundle[PLOTLY])
    assert "2 layers of 8 experts" in bundle["text/plain"]
    assert len(widget.explore.static().layout.sliders[0].steps) == 2
    words = widget.explore.figure().data[0]
    ids = [widget._trained.end_of_text, *widget._trained.ids("def rule(x):\n    return x\n")]
    assert len(words.x) == len(ids)


def test_layer_expert_and_text_move_the_figure(widget):
    layer, expert = widget.explore.sliders
    first = widget.explore.figure()
    layer.value, expert.value = 1, 3
    second = widget.explore.figure()
    assert "Layer 1, and its expert 3" in second.layout.title.text
    assert list(first.data[0].customdata) != list(second.data[0].customdata)
    widget.text.value = "def"
    assert len(widget.explore.figure().data[0].x) < len(first.data[0].x)
    assert [slider.value for slider in widget.explore.sliders] == [1, 3], "another text keeps the place"
    widget.text.value = "x = 1\n" * 4000
    assert "can be shown" in widget.problem.value and len(widget.explore.figure().data[0].x) < 20


def test_the_figure_says_what_the_facts_say():
    known = {"slots": 3, "tokens": [["a", 2, 0.5], ["\n", 1, 1.0]], "kinds": [["text", 1.0, 0.5, True]]}
    facts = {
        "tokens": [["<s>", 0, None], ["a", 9, 1.0], ["\n", 1, 0.1], ["b", 9, 2.0]],
        "experts": [[[0], [1], [1], [-1]]],
        "kinds": ["special", "whitespace", *"........"],
        "known": [[known, known]],
    }
    assert busiest(facts, 0) == 1
    figure = routed_text(facts, 0)
    words, liked = figure.data[:2]
    assert list(words.customdata) == [0, 1, 1, -1] and list(words.y) == [0, 0, 0, 1], "a line break ends a row"
    assert list(words.marker.line.width) == [0, 2.5, 2.5, 0], "the expert's own tokens have an edge"
    assert list(liked.x) == [1, 2] and liked.y[1].startswith("a")
    assert len({expert_colour(e) for e in range(96)}) == 96
