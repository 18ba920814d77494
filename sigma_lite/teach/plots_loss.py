"""Figures of the chapters on balance losses: logits in, plotly figure out."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_share, mean_over_tokens, top1_load_balancing_loss
from sigma_lite.figures.style import BLUE, VERMILLION, fade


def temperature(tau: float, logits_TE: Tensor, ids_TK: Tensor) -> go.Figure:
    """Counted share f (bars) and the Top-1 loss's fhat (dots) of each expert in fair shares, sorted by f; K = 1.

    The title gives the loss L, pbar, and L / 2: by so many fair shares may two experts differ before a token is asked to
    leave the fuller one (chapter 8).
    """
    E, probs_TE = logits_TE.shape[1], (logits_TE / tau).softmax(-1)
    f_E, fhat_E = E * load_share(expert_counts(ids_TK, E)), E * mean_over_tokens(probs_TE)
    order = f_E.argsort(descending=True, stable=True)
    loss = top1_load_balancing_loss(logits_TE, ids_TK, tau).item()
    pbar = probs_TE.gather(1, ids_TK).mean().item()
    shared = {"x": list(range(E)), "customdata": order.tolist(), "hovertemplate": "expert %{customdata}: %{y:.2f}"}
    figure = go.Figure()
    figure.add_bar(y=_rounded(f_E[order]), name="share f, counted", marker={"color": fade(VERMILLION, 0.5)}, **shared)
    dots = {"size": 5, "color": BLUE}
    figure.add_scatter(y=_rounded(fhat_E[order]), name="fhat, has a gradient", mode="markers", marker=dots, **shared)
    figure.update_yaxes(title_text="fair shares (1/E)", range=[0, 1.08 * float(max(f_E.max(), 1))])
    figure.update_xaxes(title_text="expert, by share")
    title = f"temperature {tau:g}: loss {loss:.2f}, p̄ {pbar:.2f}, tolerates {loss / 2:.2f} fair shares"
    return figure.update_layout(title=title, height=420, bargap=0.1)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
