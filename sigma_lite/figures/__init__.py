"""Recorded entries in, plotly figures out: one pure function for each picture, shared by report, lab, book and README.

Every function takes entries as `sigma_lite.record.read` returns them (one entry, where it says so) and returns a
`go.Figure` that already holds its controls (a layer menu, a slider over windows), so the same object works in a
notebook, in the book and in the report. A record without the needed entries gives a figure with a note instead of data.
"""

from sigma_lite.figures.compare import compare, compare_deviation
from sigma_lite.figures.experts import (
    balance_loss_by_layer,
    blind_spot,
    dead_experts,
    deviation_band,
    load_entropy,
    router_entropy,
)
from sigma_lite.figures.heatmap import load_heatmap, share_and_probability
from sigma_lite.figures.learning import bits_per_byte, losses, optimisation, throughput, weighted_losses
from sigma_lite.figures.sparsity import active_parameters, experts_per_token
from sigma_lite.figures.static import static_svg

__all__ = [
    "active_parameters",
    "balance_loss_by_layer",
    "bits_per_byte",
    "blind_spot",
    "compare",
    "compare_deviation",
    "dead_experts",
    "deviation_band",
    "experts_per_token",
    "load_entropy",
    "load_heatmap",
    "losses",
    "optimisation",
    "router_entropy",
    "share_and_probability",
    "static_svg",
    "throughput",
    "weighted_losses",
]
