"""Figures of the chapter on global-batch balance: domains x experts, and two losses of one router."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from sigma_lite.balance.losses import load_balancing_loss, load_share
from sigma_lite.figures.style import BLUE, GREEN, GREY, VERMILLION, fade
from sigma_lite.teach.plots import heat


def specialised_router(specialised: float, n_domains: int = 4, per_domain: int = 2) -> Tensor:
    """Share of each expert in each domain, fp32 [domains, E], E = domains * per_domain; rows sum to 1.

    Args:
        specialised: 0 every domain uses all experts equally .. 1 each has `per_domain` experts of its own.
    """
    own_DE = torch.eye(n_domains).repeat_interleave(per_domain, dim=1) / per_domain
    return specialised * own_DE + (1 - specialised) / (n_domains * per_domain)


def two_losses(f_DE: Tensor, per_micro: int) -> tuple[float, float]:
    """(mean of the micro-batches' own LBLs, LBL with the share of the whole step) of a router that is sure (P = f).

    Args:
        f_DE: share of each expert in each domain.
        per_micro: domains in a micro-batch, in equal parts; divides the number of domains.
    """
    n_domains, E = f_DE.shape
    micro_ME = f_DE.view(n_domains // per_micro, per_micro, E).mean(1)
    nothing = torch.zeros(1, 1, dtype=torch.int64)  # ids do not count where f is given
    micro = sum(load_balancing_loss(P_E[None], nothing, P_E).item() for P_E in micro_ME) / len(micro_ME)
    return micro, load_balancing_loss(f_DE, nothing, f_DE.mean(0)).item()


def losses_over_specialisation(per_micro: int, specialised: float) -> go.Figure:
    """Both losses over how specialised the router is; the dots mark the one that is looked at."""
    grid = [i / 20 for i in range(21)]
    pairs = [two_losses(specialised_router(x), per_micro) for x in grid]
    figure = go.Figure()
    for place, (name, colour) in enumerate((("micro LBL", VERMILLION), ("global LBL", BLUE))):
        figure.add_scatter(x=grid, y=[pair[place] for pair in pairs], name=name, mode="lines", line_color=colour)
        here = two_losses(specialised_router(specialised), per_micro)[place]
        figure.add_scatter(
            x=[specialised], y=[here], mode="markers+text", text=[f"{here:.2f}"], textposition="top center",
            marker={"size": 11, "color": colour}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    figure.update_xaxes(title="specialisation", range=[-0.03, 1.03])
    figure.update_yaxes(title="balance loss (1 = balanced)", range=[0.8, 4.4])
    domains = "one domain" if per_micro == 1 else f"{per_micro} domains"
    return figure.update_layout(title=f"{domains} of 4 in a micro-batch", height=400)


def domain_map(f_DE: Tensor, names: Sequence[str], title: str, high: float = 4.0) -> go.Figure:
    """Share of each expert in each domain in units of 1/E, experts sorted by the domain in which they are strongest."""
    E = f_DE.shape[1]
    home_E = f_DE.argmax(0)
    order_E = sorted(range(E), key=lambda e: (home_E[e].item(), -f_DE[home_E[e], e].item()))
    figure = heat((E * f_DE[:, order_E]).numpy(), title, "expert", "", low=0, high=high)
    figure.update_xaxes(tickvals=list(range(E)), ticktext=[str(e) for e in order_E])
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=list(names))
    return figure.update_layout(height=130 + 45 * len(names))


def specialisation(f_DE: Tensor) -> float:
    """Mean total variation distance between a domain's shares and the mean of all domains': 0 alike .. 1 - 1/domains.

    It is the share of a domain's tokens that would have to change experts for it to look like the average.
    """
    return 0.5 * (f_DE - f_DE.mean(0)).abs().sum(1).mean().item()


def loss_bars(losses: dict[str, dict[str, float]], title: str) -> go.Figure:
    """{arm: {domain: loss}} as grouped bars, nats per token."""
    figure = go.Figure()
    for (arm, values), colour in zip(losses.items(), (VERMILLION, BLUE, GREEN, GREY), strict=False):
        figure.add_bar(x=list(values), y=list(values.values()), name=arm, marker_color=fade(colour, 0.7))
        figure.data[-1].text = [f"{value:.2f}" for value in values.values()]
    figure.update_yaxes(title="held-out loss (nats per token)")
    return figure.update_layout(title=title, height=360)


def shares(counts_DE: Tensor) -> Tensor:
    """Counts of each expert in each domain -> shares, [domains, E]."""
    return load_share(counts_DE)
