"""Progressive sparsification (Sigma-MoE-Tiny, 2512.16248, section 3): experts per token as a pure function of the step.

Balance is hardest in the lowest layers. They start with more experts per token and are switched to the target sparsity
late in training, in one step. K is not a parameter: experts, router and optimizer state stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

SIGMA_HEAD = (8, 8, 6, 6, 4, 4, 2, 2)  # the report's first eight of 56 layers; the switch step is UNKNOWN


def k_per_layer(
    step: int, *, switch_step: int, n_layers: int, head: Sequence[int] = SIGMA_HEAD, target: int = 1
) -> tuple[int, ...]:
    """Experts per token in each layer at an optimizer step.

    Args:
        step: optimizer steps finished, >= 0. Steps before `switch_step` use `head` in the first layers.
        switch_step: the first step at which every layer uses `target`.
        n_layers: layers of the model; a longer head is cut to it.
        head: experts per token of the first layers before the switch.
        target: experts per token of all other layers, and of all layers after the switch.

    Returns: `n_layers` numbers. The same step always gives the same list, so a resumed run needs no state.
    """
    if step < 0 or n_layers < 1:
        raise ValueError(f"step={step} must be at least 0 and n_layers={n_layers} at least 1")
    if step >= switch_step:
        return (target,) * n_layers
    head = tuple(head)[:n_layers]
    return head + (target,) * (n_layers - len(head))
