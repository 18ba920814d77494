"""What a stage of training has moved: which tokens change expert, which experts are left idle, what was forgotten.

Both models read the same rows: held-out text, as the earlier run was measured on, and held-out problems of the tasks that
the later run was trained on. A token changes expert in a layer if the set of its experts there is another one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigma_lite.config import ConfigError, require
from sigma_lite.data.chat import Turn, marks
from sigma_lite.data.kinds import KINDS
from sigma_lite.data.rows import IGNORED
from sigma_lite.data.tasks import encode, problems
from sigma_lite.serve.generate import joined
from sigma_lite.serve.marked import Marked, Routed, at_hand, route
from sigma_lite.serve.specialise import counted, information
from sigma_lite.serve.trained import Trained

TOKENS = 30_000  # of held-out text
ROLES = ("mark", "prompt", "steps", "answer")  # what a token of a problem is


class Read(NamedTuple):
    """Rows that both models read, and a label of each token; -1: it only fills up a row."""

    marked: Marked
    labels_BS: Tensor
    names: Sequence[str]


def drift(
    now: Trained,
    before: Trained,
    data: str | Path | None = None,
    tokens: int | None = None,
    count: int = 200,
    tasks: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """What lies between two runs of one model, by layer where it says so.

    Args:
        data: folder of the prepared held-out text; default: the one of the earlier run, else this Python's library.
        count: problems of each task.
        tasks: {task: whether its steps are written}; default: those that the later run was trained on.

    Returns: of `text` and, where the tokenizer has the marks of a conversation, of `problems`: changed, the share of tokens
        that change expert; changed_old_routers, the same if the earlier run's routers are put into the later model; unused
        experts, bits that an expert tells of a token's label, and the cost, each {"before", "now"}.

    Raises: ConfigError for models of other shapes or tokenizers.
    """
    shapes = [(len(one.model.blocks), one.model.config.n_experts) for one in (before, now)]
    require(shapes[0] == shapes[1], f"drift: (layers, experts) are {shapes[0]} before and {shapes[1]} now: nothing compares")
    same = before.tokenizer.to_str() == now.tokenizer.to_str()
    require(same, "drift: the two runs have other tokenizers, so no token is the same")
    text = at_hand(before, data, tokens or TOKENS)
    sets = {"text": Read(text, text.kinds_BS.where(text.targets_BS != IGNORED, -1), KINDS)}
    if asked := tasks_of(now) if tasks is None else tasks:
        sets["problems"] = problem_rows(now, asked, count)
    found: dict[str, Any] = {"rows": sum(len(read.labels_BS) for read in sets.values()), "source": text.source}
    for name, read in sets.items():
        for what, value in _between(now, before, read).items():
            found[f"{what}_{name}"] = value
    return found


def _between(now: Trained, before: Trained, read: Read) -> dict[str, Any]:
    own_T = (read.labels_BS >= 0).flatten()
    was, new = route(before, read.marked), route(now, read.marked)
    with routers_of(now, before):
        old_routers = route(now, read.marked)
    both = {"before": was, "now": new}
    E, G = now.model.config.n_experts, len(read.names)
    return {
        "changed": changed(was, new, own_T),
        "changed_old_routers": changed(was, old_routers, own_T),
        "unused": {name: [E - len(ids_TK[own_T].unique()) for ids_TK in one.experts] for name, one in both.items()},
        "label_bits": {name: _bits(one, read.labels_BS, E, G) for name, one in both.items()},
        **_costs(both, read.marked),
    }


def changed(one: Routed, other: Routed, own_T: Tensor) -> list[float]:
    """Share of the tokens whose experts are others, of each layer."""
    shares = []
    for pair in zip(one.experts, other.experts, strict=True):
        sets = joined([ids_TK[own_T] for ids_TK in pair]).sort(1).values
        first_TK, second_TK = sets.tensor_split(2)
        shares.append(round((first_TK != second_TK).any(1).double().mean().item(), 5))
    return shares


def _bits(routed: Routed, labels_BS: Tensor, E: int, G: int) -> list[float]:
    shaped = [ids_TK.numpy().reshape(*labels_BS.shape, -1) for ids_TK in routed.experts]
    return [round(information(counted(ids, labels_BS.numpy(), E, G)), 4) for ids in shaped]


def _costs(both: dict[str, Routed], marked: Marked) -> dict[str, dict[str, float]]:
    """Bits per byte where targets have bytes of their own, and nats per scored token."""
    scored, size = int((marked.targets_BS != IGNORED).sum()), int(marked.bytes_BS.sum())
    nats = {name: float(one.nats_T.double().sum()) for name, one in both.items()}
    found = {"nats_per_token": {name: total / scored for name, total in nats.items()}}
    bits = {name: total / math.log(2) / size for name, total in nats.items()} if size else {}
    return found | ({"bits_per_byte": bits} if bits else {})


@contextlib.contextmanager
def routers_of(model: Trained, other: Trained) -> Iterator[None]:
    """Inside the block `model` routes with the other's routers."""
    routers, others = ([block.moe.router for block in one.model.blocks] for one in (model, other))
    own = [{name: value.clone() for name, value in router.state_dict().items()} for router in routers]
    try:
        for router, theirs in zip(routers, others, strict=True):
            router.load_state_dict(theirs.state_dict())
        yield
    finally:
        for router, state in zip(routers, own, strict=True):
            router.load_state_dict(state)


def tasks_of(trained: Trained) -> dict[str, bool]:
    """{task: worked} of what a run was trained on; add2 with its steps where it was trained on no problem.

    {} for a tokenizer without the marks of a conversation: nothing can be asked.
    """
    settings = trained.settings
    try:
        marks(trained.tokenizer, trained.end_of_text)
    except ConfigError:
        return {}
    sources = [*settings.get("mixture", {}).get("sources", {}).values(), settings.get("corpus", {})]
    found = {task: own.get("worked", True) for own in sources if own.get("source") == "tasks" for task in own["tasks"]}
    return found or {"add2": True}


def problem_rows(trained: Trained, tasks: Mapping[str, bool], count: int) -> Read:
    """Held-out problems with their answers, one a row; only what the assistant says is scored.

    Raises: ConfigError for a tokenizer without the marks of a conversation.
    """
    frame = marks(trained.tokenizer, trained.end_of_text)
    special = {frame.begin, frame.user, frame.assistant, frame.end, *(frame.think or ())}
    (result_mark,) = encode(trained.tokenizer, ">")
    rows, labels, owners = [], [], []
    for place, (task, worked) in enumerate(tasks.items()):
        for one in problems(task, count, heldout=True):
            with_steps = bool(one.steps) and worked
            turn = Turn(one.prompt, f">{one.answer}" if with_steps else one.answer, one.steps if with_steps else "")
            ids = frame.conversation([turn], lambda text: encode(trained.tokenizer, text))
            said = ids.index(frame.assistant)
            result = max((n for n, i in enumerate(ids) if i == result_mark), default=said)
            own = [1 if n < said else 3 if n > result else 2 for n in range(len(ids))]
            labels.append([0 if i in special else role for i, role in zip(ids, own, strict=True)])
            rows.append(ids)
            owners.append(place)
    S = max(map(len, rows))
    ids_BS, labels_BS = (_filled(part, S, fill) for part, fill in ((rows, frame.begin), (labels, -1)))
    own_BS = labels_BS >= 0
    answers_BS = torch.from_numpy(frame.answers(ids_BS.numpy())) & own_BS
    targets_BS = torch.full_like(ids_BS, IGNORED)
    targets_BS[:, :-1] = ids_BS[:, 1:].where(answers_BS[:, 1:], IGNORED)
    documents_BS, nothing_BS = (~own_BS).cumsum(1), torch.zeros_like(ids_BS)
    domains_BS = torch.tensor(owners)[:, None].where(own_BS, -1)
    source = f"{count} held-out problems of each of {', '.join(tasks)}"
    marks_BS = (nothing_BS, domains_BS, nothing_BS, domains_BS, nothing_BS)  # no kinds, and no bytes: nats a token count
    return Read(Marked(ids_BS, targets_BS, documents_BS, *marks_BS, tuple(tasks), source), labels_BS, ROLES)


def _filled(rows: Sequence[Sequence[int]], S: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (S - len(row))] for row in rows])
