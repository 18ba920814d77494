"""What a router, experts, attention or a balancer asks of a run, in a few words each: a row of the lab's family table."""

from __future__ import annotations

from typing import Any, NamedTuple


class Assumes(NamedTuple):
    """One attribute, `assumes`, of each class that may stand in another's place.

    A class says it for itself: what its parent says is not taken for granted, because one overridden method may break it.
    """

    k: str = "any"  # experts per token that it can have
    causal: str = "yes"  # whether no token's output depends on later tokens, in training and in evaluation
    state: str = "none"  # what is kept from step to step beside weights and their optimizer
    parameters: str = "none"  # what is learned beside the model's own


UNSAID = Assumes("not said", "not said", "not said", "not said")


def assumed(kind: Any) -> Assumes:
    """What a class says of itself; `UNSAID` for one that says nothing, and for a function."""
    return vars(kind).get("assumes", UNSAID) if isinstance(kind, type) else UNSAID


def together(all_of_them: list[Assumes]) -> Assumes:
    """What an arm of several parts assumes: whatever one of them does, in the order of the parts."""
    usual = Assumes()
    columns = zip(*all_of_them, strict=True) if all_of_them else ()
    told = [[said for said in dict.fromkeys(column) if said != same] for column, same in zip(columns, usual, strict=False)]
    return Assumes(*("; ".join(column) or same for column, same in zip(told or [[]] * 4, usual, strict=True)))
