"""Pass or fail for benchmarks/gpu.py: can the layer be captured in a CUDA graph, does the whole model compile?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from expert_cases import DRY, NAMES, OURS, TOY, Problem, variants

from sigma_lite.config import ModelConfig
from sigma_lite.model import Transformer


def facts(bench) -> dict:
    """Each of our backends at toy size, forward and backward: graph capture, and what a replay costs."""
    shape = DRY[0] if bench.dry else TOY
    problem = Problem(shape, bench.device, torch.float32 if bench.dry else torch.bfloat16)
    runs, reasons = variants(problem, bench.device, slow=False)
    return {
        "shape": str(shape),
        "cuda_graph": {name: captured(bench, problem, runs[name]) for name in OURS if name in runs},
        "not_run": reasons,
    }


def captured(bench, problem: Problem, run: Callable) -> dict:
    """Capture forward + backward once, replay on other inputs in the same place, compare with eager bit by bit."""
    if bench.dry:
        return {"passes": None, "why": "no GPU"}
    try:
        _, ids, _, dy = (t.clone() for t in problem.inputs[0])
        leaves = [t.detach().clone().requires_grad_() for t in problem.leaves(0)]

        def step() -> tuple[torch.Tensor, ...]:
            y = run(leaves[0], ids, *leaves[1:])
            return y, *torch.autograd.grad(y, leaves, dy)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        x, other_ids, gates, other_dy = problem.inputs[1]
        with torch.no_grad():
            for to, new in zip((leaves[0], ids, leaves[1], dy), (x, other_ids, gates, other_dy), strict=True):
                to.copy_(new)
        graph.replay()
        eager = problem.both(run, 1)
        same = {name: torch.equal(a, b) for name, a, b in zip(NAMES, results, eager, strict=True)}
        spent = [bench.clock.time(graph.replay) for _ in range(30)][10:]
        return {"passes": all(same.values()), "same_bits": same, "replay_median_ms": round(statistics.median(spent), 4)}
    except Exception as error:
        return {"passes": False, "why": f"{type(error).__name__}: {str(error)[:300]}"}


def compiled_model(bench) -> dict:
    """torch.compile of a small model, one graph, against eager: loss and a gradient norm, for each of our backends."""
    results = {}
    config = ModelConfig(vocab_size=512, n_layers=2, n_experts=8) if bench.dry else ModelConfig(n_layers=2)
    ids = torch.randint(0, config.vocab_size, (2, 16) if bench.dry else (8, 256), device=bench.device)
    for backend in ("grouped",) if bench.dry else OURS:
        if bench.left() < 60:
            results[backend] = {"passes": None, "why": "no time left"}
            continue
        began = time.perf_counter()
        try:
            torch.manual_seed(0)
            model = Transformer(config).to(bench.device, torch.float32 if bench.dry else torch.bfloat16)
            for module in model.modules():
                if hasattr(module, "backend"):
                    module.backend = backend
            eager = loss_and_norm(model, model, ids)
            torch._dynamo.reset()
            kind = "aot_eager" if bench.dry else "inductor"
            compiled = loss_and_norm(torch.compile(model, fullgraph=True, backend=kind), model, ids)
            close = all(abs(a - b) <= 2e-2 * abs(b) for a, b in zip(compiled, eager, strict=True))
            results[backend] = {"passes": close, "eager": eager, "compiled": compiled}
        except Exception as error:
            results[backend] = {"passes": False, "why": f"{type(error).__name__}: {str(error)[:300]}"}
        results[backend]["seconds"] = round(time.perf_counter() - began, 1)
    return results


def loss_and_norm(run: Callable, model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    logits = run(ids).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    norm = torch.stack([g.float().norm() for g in gradients if g is not None]).norm()
    return loss.item(), norm.item()
