"""Figures of the chapter on layer 0: how lumps of text fall on experts."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from sigma_lite.balance.zipf import longest_first, thrown
from sigma_lite.teach.style import BLUE, GREY, ORANGE


def packings(counts_V: ArrayLike, n_experts: int, k: int = 1, pieces: int = 1) -> go.Figure:
    """Loads of all experts, fullest first, in fair shares: tokens packed as well as can be, and thrown at random.

    Args:
        counts_V: occurrences of each token.
        n_experts, k: E and K.
        pieces: each token counts as so many equal tokens of their own: what context splits.
    """
    pieces_V = np.repeat(np.asarray(counts_V, np.float64) / pieces, pieces)
    fair = k * pieces_V.sum() / n_experts
    best, chance = (
        np.sort(loads)[::-1] / fair for loads in (longest_first(pieces_V, n_experts, k), thrown(pieces_V, n_experts, k))
    )
    figure, x = go.Figure(), list(range(n_experts))
    for y, name, color in ((chance, "thrown at random", ORANGE), (best, "packed, largest first", BLUE)):
        figure.add_scatter(x=x, y=y.round(4).tolist(), name=name, mode="lines", line={"shape": "hvh", "color": color})
    figure.add_hline(y=1, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(title_text="experts, fullest first", showgrid=False)
    figure.update_yaxes(title_text="load (fair shares)", rangemode="tozero")
    title = f"fullest expert: packed {100 * (best[0] - 1):+.0f} %, at random {100 * (chance[0] - 1):+.0f} %"
    return figure.update_layout(title=title, height=400)
