"""Every figure: axes named, gaps for nulls, a note without data, colours that all readers can tell apart, files."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import synthetic_run

from sigma_lite import figures
from sigma_lite.figures import series, style
from sigma_lite.storage import StorageError

RUN = synthetic_run.entries(steps=200, n_windows=10, switch=140)
OF_RUN = [
    "active_parameters", "balance_loss_by_layer", "bits_per_byte", "dead_experts", "deviation_band", "experts_per_token",
    "load_entropy", "load_heatmap", "losses", "optimisation", "router_entropy", "throughput", "weighted_losses",
]  # fmt: skip
OF_ENTRY, OF_RUNS = ["blind_spot", "share_and_probability"], ["compare", "compare_deviation"]
ALL = [*OF_RUN, *OF_ENTRY, *OF_RUNS]


def draw(name: str, entries: list[dict]) -> go.Figure:
    if name in OF_ENTRY:
        return getattr(figures, name)(series.last(entries, "load"))
    return getattr(figures, name)({"one": entries, "two": entries} if name in OF_RUNS else entries)


@pytest.mark.parametrize("name", ALL)
def test_every_axis_has_a_title(name):
    fig = draw(name, RUN)
    rows = [axis for axis in fig.select_yaxes() if axis.title.text]
    assert len(rows) == len(list(fig.select_yaxes()))
    assert sum(bool(axis.title.text) for axis in fig.select_xaxes()) == 1  # rows share the lowest one


@pytest.mark.parametrize("name", ALL)
def test_figures_are_pure(name):
    before = copy.deepcopy(RUN)
    assert draw(name, RUN).to_json() == draw(name, RUN).to_json()
    assert before == RUN


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("entries", [[], RUN[:1]], ids=["empty", "only started"])
def test_without_data_a_figure_says_what_is_missing(name, entries):
    fig = draw(name, entries)
    assert not fig.data and len(fig.layout.annotations[0].text) > 10


@pytest.mark.parametrize("name", ALL)
def test_null_values_are_gaps_and_never_an_error(name):
    entries = copy.deepcopy(RUN)
    for entry in entries[len(entries) // 2 :]:
        blank = {"lm": None, "balance": None, "z": None}
        if entry["kind"] == "step":
            entry |= {"terms": blank, "weighted": blank, "loss": None, "grad_norm": None, "tokens_per_s": None}
        if entry["kind"] == "load":
            entry["f"][1] = [None] * 96
            entry |= {"lbl": None, "P": None, "router_entropy": [None] * 4}
    fig = draw(name, entries)
    assert fig.to_json()
    if name == "deviation_band":
        assert np.isnan(fig.data[2].y[-1]) and np.isfinite(fig.data[0].y).all()
    if name == "losses":
        assert np.isnan(fig.data[0].y[-1]) and np.isfinite(fig.data[0].y[0])


# ------------------------------------------------------------------------------------------------------------- look


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("paper", [style.LIGHT_PAPER, style.DARK_PAPER])
@pytest.mark.parametrize("colour", [*style.SERIES, *(style.depth_colour(layer, 9) for layer in range(9))])
def test_lines_have_a_contrast_of_3_on_both_papers(colour, paper):
    bright, dim = sorted((_linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (colour, paper)), reverse=True)
    assert bright / dim >= 3


def test_colours_stay_apart_for_colour_blind_readers():
    """Full protanopia and deuteranopia after Machado, Oliveira and Fernandes (2009), on linear RGB."""
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    for seen in (np.eye(3), np.array(protan), np.array(deutan)):
        perceived = [np.clip(seen @ _linear(c), 0, 1) ** (1 / 2.2) for c in style.SERIES[:4]]  # as many as meet in a figure
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(perceived, 2)) > 0.1


@pytest.mark.parametrize("template", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_words_inside_faint_boxes_have_the_ink_of_the_theme(template):
    ink = template.layout.font.color
    assert template.data.bar[0].insidetextfont.color == template.data.heatmap[0].textfont.color == ink


def test_figures_import_no_torch():
    code = "import sys, sigma_lite.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


# ------------------------------------------------------------------------------------------------------------- files


def test_svg_without_kaleido_names_the_fix(monkeypatch, tmp_path):
    def absent(*args, **kwargs):
        raise ValueError("Image export requires kaleido")

    monkeypatch.setattr(go.Figure, "to_image", absent)
    with pytest.raises(StorageError, match="pip install kaleido"):
        figures.static_svg(figures.losses(RUN), tmp_path / "losses.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.slow
def test_the_same_figure_gives_the_same_svg(tmp_path):
    pytest.importorskip("kaleido")
    if not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))):
        pytest.skip("needs a Chrome or Chromium")
    one, two = (
        figures.static_svg(figures.deviation_band(RUN), tmp_path / name).read_text("utf-8") for name in ("1.svg", "2.svg")
    )
    assert one == two and one.startswith("<svg") and "layer 0" not in one
