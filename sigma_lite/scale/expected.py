"""What a run should look like by its plan: kept with the run when it starts, and compared with what was measured."""

from __future__ import annotations

from typing import Any

from sigma_lite.config import ConfigError
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.notes import guessed

STAGES = ("initial", "target")  # before the switch of sparsity, and after it
OF_A_STAGE = ("step_seconds", "tokens_per_second", "mfu", "peak_bytes")


def expected(run: RunConfig, cluster: str | None = None, device: str = "") -> dict[str, Any]:
    """The numbers of a plan that a run shows too, as plain values; {"refused": why} where nothing can be planned.

    Args:
        cluster: as `sigma-lite plan --cluster`; None: the built-in machine of this GPU, or what `plan` takes by default.
        device: name of the GPU at hand.
    """
    try:
        facts = forecast(run, cluster or ("h200-node" if "H200" in device else None))
    except ConfigError as error:  # a part of the reader's own, or a machine that nobody has described
        return {"refused": str(error)}
    machine, layout = facts["cluster"], facts["layout"]
    return {
        "cluster": machine["name"],
        "by_default": cluster is None,
        "kind": machine["kind"],
        "devices": layout["devices"],
        "peak_tflops": machine["peak_tflops"],
        "layout_problem": layout["problem"],
        "total_params": facts["total_params"],
        "guessed": guessed(run),
        "k": {stage: facts[f"k_{stage}"] for stage in STAGES},
        **{stage: {name: facts[stage][name] for name in OF_A_STAGE} for stage in STAGES},
        "hours": facts["run"] and facts["run"]["hours"],
    }
