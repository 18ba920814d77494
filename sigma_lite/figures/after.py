"""After pretraining: what rewards did step by step, and what lies between two runs (`sigma-lite eval RUN drift`)."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.known import NOT_EVALUATED
from sigma_lite.figures.learning import halflife_of
from sigma_lite.figures.series import Entries, column, ema, of_kind
from sigma_lite.figures.style import BLUE, GREY, VERMILLION, fade

ROWS = {  # of the figure of rewards: name in the record -> (what it is, unit)
    "reward": ("right answers", "share"),
    "length": ("length of an answer", "tokens"),
    "dead": ("groups without a difference", "share"),
    "entropy": ("entropy of the next token", "nats"),
}
SETS = {"text": "held-out text", "problems": "problems"}


def rewards(entries: Entries) -> go.Figure:
    """What the answers of each step earned, how long they were, and how many groups taught nothing."""
    steps = [entry for entry in of_kind(entries, "step") if entry.get("rewards")]
    if not steps:
        return style.note("Rewards", "no step of rewards recorded yet")
    x = column(steps, "step")
    halflife = halflife_of(x)
    fig = make_subplots(
        rows=len(ROWS), shared_xaxes=True, vertical_spacing=0.07, subplot_titles=[w for w, _ in ROWS.values()]
    )
    fig.update_annotations(x=0, xanchor="left", font_size=13)
    for row, (name, (what, unit)) in enumerate(ROWS.items(), start=1):
        values, colour = column(steps, "rewards", name), style.SERIES[row - 1]
        raw = {"color": fade(colour, 0.45), "width": 1}
        fig.add_scatter(x=x, y=values, line=raw, name=f"{what}, each step", row=row, col=1)
        fig.add_scatter(x=x, y=ema(x, values, halflife), line_color=colour, name=f"{what}, average", row=row, col=1)
        fig.update_yaxes(title_text=unit, rangemode="tozero", row=row, col=1)
    fig.update_traces(mode="lines", hovertemplate="%{y:.3f}")
    fig.update_xaxes(title_text="optimizer step", row=len(ROWS), col=1)
    subtitle = f"thick: moving average with a half-life of {halflife:.0f} steps"
    return style.dress(fig, "Rewards", subtitle, height=140 + 150 * len(ROWS), showlegend=False, hovermode="x unified")


def drift(entry: dict) -> go.Figure:
    """Share of tokens that change expert in each layer, and as many as would with the earlier routers; of one entry."""
    title, sets = "Which tokens changed expert", _sets(entry)
    if not sets:
        return style.note(title, NOT_EVALUATED.format("drift --against EARLIER"))
    fig = go.Figure()
    for name, colour in zip(sets, (BLUE, VERMILLION), strict=False):
        for kind, what, opacity in (("changed", "", 1.0), ("changed_old_routers", ", with the earlier routers", 0.4)):
            shares = [100 * share for share in entry[f"{kind}_{name}"]]
            label = f"{SETS[name]}{what}"
            fig.add_bar(x=[*range(len(shares))], y=shares, name=label, marker_color=fade(colour, opacity))
    fig.update_traces(hovertemplate="%{y:.1f} %")
    fig.update_xaxes(title_text="layer", dtick=1)
    fig.update_yaxes(title_text="% of the tokens", range=[0, 100], ticksuffix=" %")
    subtitle = f"since step {entry['against_step']:,} of {entry['against']}; the same rows were read by both"
    return style.dress(fig, title, subtitle, barmode="group", hovermode="x unified")


def unused(entry: dict) -> go.Figure:
    """Experts of each layer that none of these tokens reached, before and now; of one `drift` entry."""
    title, sets = "Experts without a token", _sets(entry)
    if not sets:
        return style.note(title, NOT_EVALUATED.format("drift --against EARLIER"))
    fig = go.Figure()
    for name, colour in zip(sets, (BLUE, VERMILLION), strict=False):
        for when, what in (("before", fade(GREY, 0.5)), ("now", colour)):
            idle = entry[f"unused_{name}"][when]
            pattern = {"color": what, "pattern": {"shape": "/" if name == "problems" and when == "before" else ""}}
            fig.add_bar(x=[*range(len(idle))], y=idle, name=f"{SETS[name]}, {when}", marker=pattern)
    fig.update_traces(hovertemplate="%{y}")
    fig.update_xaxes(title_text="layer", dtick=1)
    fig.update_yaxes(title_text="experts", rangemode="tozero")
    return style.dress(fig, title, "the same rows were read by both runs", barmode="group", hovermode="x unified")


def _sets(entry: dict) -> list[str]:
    return [name for name in SETS if f"changed_{name}" in entry]
