"""One object, two faces: a live widget, and a figure that needs no kernel."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import pytest

from sigma_lite.config import ConfigError
from sigma_lite.teach import Explore, predict

PLOTLY = "application/vnd.plotly.v1+json"


def draw(k, height=1):
    """As many traces as k says, another kind for k = 3, and a title that names it."""
    traces = [go.Bar(y=[height, k]) for _ in range(k)] if k < 3 else [go.Scatter(y=[height, k])]
    figure = go.Figure(traces, layout={"title": {"text": f"k = {k}"}})
    return figure.update_layout(xaxis_range=[0, 1]) if k == 2 else figure


@pytest.fixture
def explore():
    return Explore(draw, "k", [1, 2, 3], also={"height": [1, 5]}, start={"k": 2, "height": 5})


def apply(figure: go.Figure, step: int) -> go.Figure:
    """What plotly.js does on a click at a slider step."""
    traces, layout = figure.layout.sliders[0].steps[step].args
    moved = go.Figure(figure)
    for trace, visible in zip(moved.data, traces["visible"], strict=True):
        trace.visible = visible
    for key, value in layout.items():
        moved.layout[key] = value
    return moved


@pytest.mark.parametrize("step, k", enumerate([1, 2, 3]))
def test_each_step_shows_the_figure_of_its_value(explore, step, k):
    moved, wanted = apply(explore.static(), step), draw(k, 5)
    shown = [trace for trace in moved.data if trace.visible]
    assert [(trace.type, list(trace.y)) for trace in shown] == [(trace.type, list(trace.y)) for trace in wanted.data]
    assert moved.layout.title.text == f"k = {k}"
    assert moved.layout.xaxis.range == wanted.layout.xaxis.range, "a range must not stay behind"


def test_static_face_opens_at_the_start(explore):
    static = explore.static()
    assert static.layout.sliders[0].active == 1 and static.layout.title.text == "k = 2"
    assert [bool(trace.visible) for trace in static.data] == [False, True, True, False]


def test_both_faces_are_offered_and_are_json(explore):
    bundle = explore._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", PLOTLY} <= set(bundle)
    json.dumps(bundle[PLOTLY])
    assert bundle["text/plain"] == "Explore(k = 2, height = 5)"


def test_moving_any_slider_redraws_the_live_face(explore):
    def live():
        (output,) = explore.children[-1].outputs
        return output["data"][PLOTLY]["layout"]["title"]["text"], output["data"][PLOTLY]["data"][0]["y"][0]

    assert live() == ("k = 2", 5)
    explore.sliders[0].value = 3
    assert live() == ("k = 3", 5)
    explore.sliders[1].value = 1
    assert live() == ("k = 3", 1)
    assert explore.figure().layout.title.text == "k = 3"


def test_static_face_is_small():
    from sigma_lite.teach import style

    style.use()
    one = len(json.dumps(Explore(draw, "k", [1])._repr_mimebundle_()[PLOTLY]))
    twenty = len(json.dumps(Explore(draw, "k", list(range(1, 3)) * 10)._repr_mimebundle_()[PLOTLY]))
    assert one < 4000 and twenty < one + 20 * 700, "the template belongs into the page once, not into each step"


def test_start_must_be_among_the_values():
    with pytest.raises(ConfigError, match="start k=9"):
        Explore(draw, "k", [1, 2], start={"k": 9})
    with pytest.raises(ConfigError, match="'q'"):
        Explore(draw, "k", [1, 2], start={"q": 1})


def test_prediction_keeps_the_guess_and_has_a_face_without_kernel():
    question = predict("How many <b>bytes</b>?", ["about 1", "about 3"])
    assert question.guess is None and "none yet" in repr(question.compare("3.4"))
    question.children[1].value = "about 3"
    assert question.guess == "about 3"
    page = question.compare("3.4")._repr_mimebundle_()["text/html"]
    assert "about 3" in page and "3.4" in page
    face = question._repr_mimebundle_()["text/html"]
    assert face.count('type="radio"') == 2 and "<b>bytes" not in face
    assert question.key in face and question.key in page
