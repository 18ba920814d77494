"""Where a config, a command and a cluster file do not say the same: which of them a plan follows, in a sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import STRATEGY, devices_wanted, strategy_config

KINDS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}  # accelerator: kind of a cluster's devices


def notes(run: RunConfig, described: Cluster, placed: Cluster, nodes: int | None, problem: str) -> list[str]:
    """What a reader of the plan would take for granted and is not so."""
    found = [f"the config's own layout is not planned: {problem}"] if problem else []
    found += _nodes(run, described, placed, nodes) + _devices(run, described, placed)
    accelerator = run.trainer.get("accelerator")
    if KINDS.get(str(accelerator), described.kind) != described.kind:
        found.append(
            f"trainer.accelerator={accelerator}, but the devices of cluster {described.name!r} are {described.kind}s"
        )
    return found + _schedule(run) + _left_out(run) + _straddling(run, placed)


def _schedule(run: RunConfig) -> list[str]:
    switch, last, head = run.sparsity.switch_step, run.trainer.get("max_steps"), run.sparsity.head
    if head and isinstance(last, int) and switch >= last:
        return [
            f"sparsity.switch_step={switch} is not before trainer.max_steps={last}: the run ends without a step after it"
        ]
    return []


def _left_out(run: RunConfig) -> list[str]:
    """Settings that change what a run takes and that the planner knows nothing of."""
    strategy = strategy_config(run.trainer.get("strategy"))
    left = {
        "model.custom_balance": run.custom_balance is not None,
        "trainer.max_time": run.trainer.get("max_time") is not None,
        "trainer.strategy's compile_attention": strategy is not None and strategy.compile_attention,
        "trainer.strategy's replan_every": strategy is not None and strategy.replan_every > 0,
    }
    return [guessed(run)] * bool(run.parts) + [f"{name} is not planned" for name, given in left.items() if given]


def guessed(run: RunConfig) -> str:
    """What nobody can know of the reader's own parts, as a sentence that names them; "" without."""
    own = ", ".join(f"model.parts.{name}" for name in run.parts or ())
    guesses = "activations are those of the usual parts, and time is 2 FLOPs for each parameter that a token uses"
    return f"{own}: parameters are counted, the rest is a guess: {guesses}" if own else ""


def _straddling(run: RunConfig, placed: Cluster) -> list[str]:
    strategy, per_node = strategy_config(run.trainer.get("strategy")), placed.devices_per_node
    ranks = strategy.expert_parallel if strategy else 1
    if placed.nodes == 1 or per_node % ranks == 0 or ranks % per_node == 0:
        return []
    return [
        f"expert_parallel={ranks} and {per_node} devices of a node: some exchanges cross nodes, traffic is near, not exact"
    ]


def whole_model_everywhere(run: RunConfig, cluster: Cluster) -> str:
    """Why several devices without this package's strategy are not planned as they are."""
    strategy = run.trainer.get("strategy") or "auto"
    name = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
    return (
        f"trainer.strategy={name} would hold the whole model on each of {cluster.size()}; set {STRATEGY} as in"
        " scaled_configs/overlays/eight_gpus.yaml"
    )


def _nodes(run: RunConfig, described: Cluster, placed: Cluster, nodes: int | None) -> list[str]:
    own, number = run.trainer.get("num_nodes"), described.nodes
    if nodes:
        return [f"--nodes {nodes} wins over trainer.num_nodes={own}; give it to fit too"] if own not in (None, nodes) else []
    if own is None and placed.nodes > 1:
        return [
            f"the config names no trainer.num_nodes: {number} nodes of cluster {described.name!r} are planned, fit takes 1"
        ]
    if own not in (None, number):
        return [f"trainer.num_nodes={own} of the config wins over nodes: {number} of cluster {described.name!r}"]
    return []


def _devices(run: RunConfig, described: Cluster, placed: Cluster) -> list[str]:
    wanted, number = devices_wanted(run), described.devices_per_node
    if wanted is None and number > 1:
        given = run.trainer.get("devices", "auto")
        return [f"trainer.devices={given} names no number: all {number} devices of a node are planned"]
    if wanted not in (None, number):
        how = "shared by so many processes" if wanted > number else "of a node are planned"
        return [
            f"trainer.devices={wanted} of the config wins over {number} of cluster {described.name!r}: {placed.size()} {how}"
        ]
    return []
