"""How many messages a piece of training sends, and how large they are.

with Messages() as messages:
    loss = ...; loss.backward()
messages.calls["all-to-all"], messages.sent["all-to-all"], messages.waits
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class Messages(TorchDispatchMode):
    """Counts what this rank hands to torch.distributed between enter and exit, in the backward pass too.

    `sent` are the bytes handed over, the rank's own part included. `waits` are the times that the host asks for numbers of
    a tensor: on a GPU it then stands still until the device has computed them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            short = func._schema.name.partition("::")[2]
            name = NAMES.get(short, short)
            handed = args[0] if short == "allreduce_" else args[1]  # in place; the others take (output, input, ...)
            self.calls[name] += 1
            self.sent[name] += sum(leaf.nbytes for leaf in tree_leaves(handed) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Messages:
        self._asked = {name: getattr(Tensor, name) for name in ("tolist", "item")}
        for name, original in self._asked.items():
            setattr(Tensor, name, self._counting(original))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, original in self._asked.items():
            setattr(Tensor, name, original)
        super().__exit__(*error)

    def _counting(self, original: Any) -> Any:
        def asked(tensor: Tensor) -> Any:
            self.waits += 1
            return original(tensor)

        return asked


def as_row(messages: Messages) -> dict[str, int]:
    """Plain numbers: calls and bytes of every kind, and waits."""
    calls = {f"{name} calls": n for name, n in sorted(messages.calls.items())}
    return calls | {f"{name} bytes": n for name, n in sorted(messages.sent.items())} | {"host waits": messages.waits}
