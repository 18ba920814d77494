"""What `show`, `reveal` and `setup` promise."""

from __future__ import annotations

import inspect

import plotly.io as pio
import pytest
import torch

from sigma_lite.config import ConfigError
from sigma_lite.model import router
from sigma_lite.teach import fast, folder, plots, reveal, setup, show


def test_show_prints_the_real_source_with_true_line_numbers():
    source = show("model.router.Router.forward")
    lines, first = inspect.getsourcelines(router.Router.forward)
    assert source.file == "sigma_lite/model/router.py"
    shown = repr(source).splitlines()[1:]
    assert shown[0] == f"{first} {lines[0].strip()}" and len(shown) == len(lines)
    assert repr(show("model.router")).splitlines()[1].lstrip().startswith("1 ")


def test_show_has_a_coloured_face_with_every_word():
    html = show("model.router.Router.routing")._repr_html_()
    assert "choose" in html and "sigma_lite/model/router.py" in html and "color: var(--code-" in html


def test_reveal_folds_idea_shapes_and_source_in_that_order():
    html = reveal("balance.losses.load_balancing_loss")._repr_html_()
    places = [html.index(title) for title in ("the idea", "the shapes", "the source")]
    assert places == sorted(places) and html.count("<details>") == 3
    assert "def" in html[places[2] :] and "def" not in html[: places[1]]


@pytest.mark.parametrize("name, near", [("model.ruter", "router"), ("model.router.Rooter", "Router")])
def test_wrong_names_get_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        show(name)


def test_setup_makes_two_sessions_alike(capsys, monkeypatch):
    monkeypatch.delenv("SIGMA_FAST", raising=False)
    threads, renderer = torch.get_num_threads(), pio.renderers.default
    try:
        setup(chapter=1, version="0.1")
        first = torch.rand(3)
        setup(chapter=1, version="0.1")
        assert torch.equal(first, torch.rand(3))
        assert torch.get_num_threads() == 1 and torch.get_default_dtype() == torch.float32
        assert pio.renderers.default == "plotly_mimetype"
        assert "min on two CPU cores" in capsys.readouterr().out
        setup(chapter=11, version="0.1")  # was chapter 10 when its text was written
        assert torch.initial_seed() == 10 and "chapter 11" in (said := capsys.readouterr().out) and "seed 10" in said
    finally:
        torch.set_num_threads(threads)
        pio.renderers.default = renderer
        pio.templates.default = "plotly"


def test_setup_refuses_another_version_and_an_unknown_chapter():
    with pytest.raises(ConfigError, match="written for sigma_lite 9.9"):
        setup(chapter=1, version="9.9")
    with pytest.raises(ConfigError, match="chapter=99"):
        setup(chapter=99, version="0.1")


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), ("", False)])
def test_fast_follows_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("SIGMA_FAST", value)
    assert fast() is expected


def test_folder_is_in_the_repository_and_not_in_git():
    assert folder("chapters").endswith("data/chapters")


def test_token_strip_lays_pieces_side_by_side():
    figure = plots.token_strip(["ab", "c", "\n", "dd"], "title", columns=10)
    boxes = sorted((bar.y[i], bar.base[i], bar.x[i]) for bar in figure.data for i in range(len(bar.y)))
    assert boxes == [(0, 0, 2), (0, 2, 1), (0, 3, 1), (1, 0, 2)]


def test_token_strip_gives_each_kind_one_colour():
    figure = plots.token_strip(["a", "b", "a"], "title", kinds=["name", "space", "name"])
    assert {bar.name: len(bar.y) for bar in figure.data} == {"name": 2, "space": 1}
    assert len({bar.marker.line.color for bar in figure.data}) == 2
