"""Does it learn, and how fast: losses, held-out bits per byte, learning rate, gradient norm, throughput."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.series import Entries, column, ema, known, last, of_kind, thin, tokens_at

TERMS = {  # name in the record: (what it is, unit)
    "lm": ("language-model loss", "nats per token"),
    "policy": ("policy loss", "−advantage × log p"),
    "balance": ("balance loss", "1 = balanced"),
    "z": ("router z-loss", "squared log-sum-exp"),
}
BASELINES = {  # name in the record's data: what it is; the first is the one to compare a trained model with
    "xz_given_training_bits_per_byte": "xz -9e given the training text",
    "xz_bits_per_byte": "xz -9e given no training text",
    "unigram_bits_per_byte": "token frequencies alone",
}
NO_STEPS = "no step recorded yet"


def halflife_of(steps: np.ndarray) -> float:
    """Default half-life of the moving average in steps: 0.5 % of the run, at least 3."""
    return max(3.0, round(float(steps[-1]) / 200)) if len(steps) else 3.0


def losses(entries: Entries, halflife: float | None = None) -> go.Figure:
    """Every loss term before its weight, one row each: the recorded steps and their moving average.

    `halflife` in steps (default: 0.5 % of the run, at least 3). Long runs draw the extremes of each stretch.
    """
    records, names = of_kind(entries, "step"), _terms(entries)
    if not names:
        return style.note("Loss terms", NO_STEPS)
    steps = column(records, "step")
    halflife = halflife or halflife_of(steps)
    titles = [TERMS.get(name, (name,))[0] for name in names]
    fig = make_subplots(rows=len(names), shared_xaxes=True, vertical_spacing=0.09, subplot_titles=titles)
    fig.update_annotations(x=0, xanchor="left", font_size=13)
    for row, name in enumerate(names, start=1):
        what, unit = TERMS.get(name, (name, "raw"))
        values, colour = column(records, "terms", name), style.SERIES[(row - 1) % len(style.SERIES)]
        smooth, keep = ema(steps, values, halflife), thin(values)
        raw = {"color": style.fade(colour, 0.45), "width": 1}
        fig.add_scatter(
            x=steps[keep], y=values[keep], line=raw, name=f"{what}, each step", mode=_mode(values), row=row, col=1
        )
        fig.add_scatter(x=steps[keep], y=smooth[keep], line_color=colour, name=f"{what}, average", row=row, col=1)
        fig.update_yaxes(title_text=unit, row=row, col=1)
    fig.update_traces(hovertemplate="%{y:.4f}")
    fig.update_xaxes(title_text="optimizer step", row=len(names), col=1)
    style.mark_switch(fig, entries)
    subtitle = f"before weights; thick: moving average with a half-life of {halflife:.0f} steps"
    height = 140 + 190 * len(names)
    return style.dress(fig, "Loss terms", subtitle, height=height, showlegend=False, hovermode="x unified")


def weighted_losses(entries: Entries, halflife: float | None = None) -> go.Figure:
    """What each term adds to the total loss, on a log axis: the moving averages after their weights.

    A term that was meant to act and does not, or one that drowns the language model, shows here first.
    """
    records, names = of_kind(entries, "step"), _terms(entries)
    if not names:
        return style.note("Weighted loss terms", NO_STEPS)
    steps, fig = column(records, "step"), go.Figure()
    halflife = halflife or halflife_of(steps)
    for name, colour in zip(names, style.SERIES * len(names), strict=False):
        smooth = ema(steps, column(records, "weighted", name), halflife)
        smooth[smooth <= 0] = np.nan  # a log axis has no place for a term whose weight is 0
        keep = thin(smooth)
        fig.add_scatter(
            x=steps[keep], y=smooth[keep], name=TERMS.get(name, (name,))[0], line_color=colour, mode=_mode(smooth)
        )
    fig.update_traces(hovertemplate="%{y:.3g}")
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text="part of the total loss (nats per token)", type="log", dtick=1, tickformat="~g")
    style.mark_switch(fig, entries)
    return style.dress(fig, "Weighted loss terms", "what each term adds to the total", hovermode="x unified")


def bits_per_byte(entries: Entries) -> go.Figure:
    """Held-out bits per byte of text over training tokens, against BASELINES on the same bytes, as the run entry has them.

    Range: 0..8, lower is better. Of a mixture each source has a dotted line.
    """
    records = of_kind(entries, "validation")
    if not records:
        return style.note("Held-out bits per byte", "no validation recorded yet")
    tokens, values = tokens_at(entries, column(records, "step")), column(records, "bits_per_byte")
    fig = go.Figure()
    data = last(entries, "run").get("data") or {}
    for (key, name), dash in zip(BASELINES.items(), ("solid", "dash", "dot"), strict=True):
        if known(data.get(key)):
            style.level(fig, np.append(tokens, 0), data[key], f"{name}: {data[key]:.3f}", dash=dash)
    fig.add_scatter(
        x=tokens,
        y=values,
        name=f"this model: {values[-1]:.3f}" if known(values[-1]) else "this model",
        mode="lines+markers",
        line_color=style.BLUE,
        customdata=column(records, "step"),
        hovertemplate="%{y:.4f} bits per byte<br>%{x:.4s} tokens, step %{customdata:,.0f}<extra></extra>",
    )
    for source in records[-1].get("sources") or {}:
        each = np.array([(entry.get("sources") or {}).get(source, {}).get("bits_per_byte", np.nan) for entry in records])
        fig.add_scatter(x=tokens, y=each, name=f"{source}: {each[-1]:.3f}", mode="lines", line={"width": 1, "dash": "dot"})
    fig.update_xaxes(title_text="training tokens", tickformat="~s", rangemode="tozero")
    fig.update_yaxes(title_text="held-out bits per byte")
    return style.dress(fig, "Held-out bits per byte", "lower is better; all on the same held-out bytes", hovermode="closest")


def optimisation(entries: Entries) -> go.Figure:
    """Learning rate, and the norm of the gradient before clipping (log axis), over steps."""
    records = of_kind(entries, "step")
    if not records:
        return style.note("Learning rate and gradient norm", NO_STEPS)
    steps, fig = column(records, "step"), make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    for row, (key, name, colour) in enumerate(
        (("lr", "learning rate", style.GREEN), ("grad_norm", "gradient norm", style.PINK)), start=1
    ):
        values = column(records, key)
        keep = thin(values)
        fig.add_scatter(
            x=steps[keep],
            y=values[keep],
            name=name,
            line={"color": colour, "width": 1.5},
            mode=_mode(values),
            row=row,
            col=1,
        )
    fig.update_traces(hovertemplate="%{y:.3g}")
    fig.update_yaxes(title_text="learning rate", rangemode="tozero", exponentformat="e", row=1, col=1)
    fig.update_yaxes(title_text="gradient norm (L2)", type="log", dtick="D2", tickformat="~g", row=2, col=1)
    fig.update_xaxes(title_text="optimizer step", row=2, col=1)
    style.mark_switch(fig, entries)
    title = "Learning rate and gradient norm"
    return style.dress(fig, title, "gradient before clipping", height=440, showlegend=False, hovermode="x unified")


def throughput(entries: Entries) -> go.Figure:
    """Training tokens per second at each step, with the median as a line."""
    records = of_kind(entries, "step")
    values = column(records, "tokens_per_s")
    if not np.isfinite(values).any():
        return style.note("Throughput", NO_STEPS)
    steps, keep, fig = column(records, "step"), thin(values), go.Figure()
    fig.add_scatter(x=steps[keep], y=values[keep], name="each step", mode=_mode(values))
    fig.update_traces(
        line={"color": style.BLUE, "width": 1}, hovertemplate="%{y:,.0f} tokens/s<br>step %{x:,.0f}<extra></extra>"
    )
    median = float(np.nanmedian(values))
    style.level(fig, steps, median, f"median: {median:,.0f} tokens/s")
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text="training tokens per second", rangemode="tozero")
    style.mark_switch(fig, entries)
    return style.dress(fig, "Throughput", "one point for each recorded step", hovermode="closest")


def _terms(entries: Entries) -> list[str]:
    """Names of the recorded loss terms, the known ones first."""
    found = {name for entry in of_kind(entries, "step") for name in entry.get("terms") or {}}
    return [n for n in TERMS if n in found] + sorted(found - set(TERMS))


def _mode(values: np.ndarray) -> str:
    """One value alone has no line to draw."""
    return "lines" if len(values) > 1 else "markers"
