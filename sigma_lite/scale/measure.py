"""What a step really takes of a CPU's memory: the measurements that the planner is held to. Tensors only, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def largest(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at one time, of those it asked torch's CPU allocator for: the same every time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += size
        most = max(most, held)
    return most


def kept_for_backward(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of one forward pass: each storage once, `own` (weights, buffers, inputs) left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found: dict[int, Tensor] = {}  # held, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del result
    return total
