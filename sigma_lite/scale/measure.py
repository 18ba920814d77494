"""What a step really takes of a CPU's memory: the measurements that the planner is held to. Tensors only, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile


def largest(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at one time, of those it asked torch's CPU allocator for: the same every time.

    What another thread gives back, as gloo's do, the profiler does not see. That it was given back shows when the address
    is handed out again; until then it is counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    sizes: dict[int, int] = {}
    held = most = 0
    for _, address, size in _allocations(recorded.profiler.kineto_results.experimental_event_tree()):
        held += max(size, 0) - sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
        most = max(most, held)
    return most


def _allocations(events: list) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of every block given out, and with bytes < 0 taken back, in order."""
    found, left = [], list(events)
    while left:
        event = left.pop()
        left.extend(event.children)
        if isinstance(event.extra_fields, _ExtraFields_Allocation):
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found, key=lambda block: block[0])


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
