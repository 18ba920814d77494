"""One autograd node around a whole expert layer, and the two operators that `torch.compile` sees in its place.

In eager mode a plain function pair: operators would only add their own overhead to every call. While `torch.compile`
traces, forward and backward are custom operators: opaque calls that neither break the graph nor are looked into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assumed_constant(function: Callable) -> Callable:
    """torch.compile calls it while it traces, and keeps the answer.

    What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True
    return function


def one_node(
    name: str, forward: Callable, backward: Callable, forward_fake: Callable, backward_fake: Callable, keep_x: bool
):
    """(apply, forward operator, backward operator) for grouped_swiglu(x, ids, gates, w13, w2).

    `forward` returns y and whatever else `backward` needs, new tensors all; `backward` takes dy, these, x if `keep_x`,
    then gates, w13, w2, and returns the gradients of x, gates, w13 and w2. The fakes give shapes for the same arguments.
    """
    forward_op = torch.library.custom_op(f"sigma_lite::{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"sigma_lite::{name}_backward", backward, mutates_args=())
    forward_op.register_fake(forward_fake)
    backward_op.register_fake(backward_fake)

    class GroupedSwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor):
            run = forward_op if torch.compiler.is_compiling() else forward
            y_TD, *kept = run(x_TD, ids_TK, gates_TK, w13, w2)
            ctx.save_for_backward(*kept, *([x_TD] if keep_x else []), gates_TK, w13, w2)
            return y_TD

        @staticmethod
        def backward(ctx, dy_TD: Tensor):
            run = backward_op if torch.compiler.is_compiling() else backward
            dx_TD, dgates_TK, dw13, dw2 = run(dy_TD, *ctx.saved_tensors)
            return dx_TD, None, dgates_TK, dw13, dw2

    return GroupedSwiGLU.apply, forward_op, backward_op
