"""Recorded entries in, plotly figures out: one pure function for each picture, shared by report, lab, book and README.

Every function takes entries as `sigma_lite.record.read` returns them (one entry, where it says so) and returns a
`go.Figure` that already holds its controls (a layer menu, a slider over windows), so the same object works in a
notebook, in the book and in the report. A record without the needed entries gives a figure with a note instead of data.
The functions in OF_RESULTS take the results of a lab experiment instead (`sigma_lite.lab.read_results`).
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
from sigma_lite.figures.lab import bias_spread, layer0_deviation, learning_curves, load_and_probability
from sigma_lite.figures.lab_final import (
    deviation_by_layer,
    deviation_by_sparsity,
    final_rows,
    final_table,
    loss_against_balance,
)
from sigma_lite.figures.lab_measured import (
    domain_expert_map,
    information_by_layer,
    lumps_and_load,
    predicted_and_measured,
)
from sigma_lite.figures.learning import bits_per_byte, losses, optimisation, throughput, weighted_losses
from sigma_lite.figures.origin import commits_of, machine_of, origins, refused_steps
from sigma_lite.figures.sparsity import active_parameters, experts_per_token
from sigma_lite.figures.static import static_svg
from sigma_lite.figures.worth import bits_against

OF_RESULTS = {
    draw.__name__: draw
    for draw in (
        layer0_deviation,
        load_and_probability,
        bias_spread,
        learning_curves,
        loss_against_balance,
        deviation_by_layer,
        deviation_by_sparsity,
        final_table,
        lumps_and_load,
        predicted_and_measured,
        information_by_layer,
        domain_expert_map,
        bits_against,
    )
}

__all__ = [
    "OF_RESULTS",
    "active_parameters",
    "balance_loss_by_layer",
    "bits_against",
    "bias_spread",
    "bits_per_byte",
    "blind_spot",
    "commits_of",
    "compare",
    "compare_deviation",
    "dead_experts",
    "deviation_band",
    "deviation_by_layer",
    "deviation_by_sparsity",
    "domain_expert_map",
    "experts_per_token",
    "final_rows",
    "final_table",
    "information_by_layer",
    "layer0_deviation",
    "learning_curves",
    "load_and_probability",
    "load_entropy",
    "load_heatmap",
    "loss_against_balance",
    "losses",
    "lumps_and_load",
    "machine_of",
    "optimisation",
    "origins",
    "predicted_and_measured",
    "refused_steps",
    "router_entropy",
    "share_and_probability",
    "static_svg",
    "throughput",
    "weighted_losses",
]
