"""Text of another kind: new experts beside frozen ones against fine-tuning, and what each forgets; then half of the experts.

The model is a finished run of usual experts. The other text is this repository's own prose (README.md, book/*.md and
book/log/*.md) or the files given, read by the run's tokenizer. Writes results/bench/new_modules-NAME.json.

    python benchmarks/new_modules.py --model NAME_OR_RUN [--text FILE ...] [--steps 30] [--heldout 32] [--out FILE]

72 steps took 7 core-minutes for 4 layers of 32 experts, width 128 (on one thread, in company).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from chosen import RESULTS, add_model, opened, said

from sigma_lite.convert.calibrate import heldout
from sigma_lite.convert.distil import descend, mean_lbl
from sigma_lite.data.rows import Batch
from sigma_lite.data.tokenizer import token_bytes
from sigma_lite.model import Transformer
from sigma_lite.papers.compression import Prune
from sigma_lite.papers.moduleformer import Concentrate, Grow, new_weights
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import sha256_of, write_json
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
PER_BATCH, LENGTH, RATE, BALANCE = 4, 256, 1e-3, 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "book" / "log").glob("*.md"))],
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--heldout", type=int, default=32)
    options = parser.parse_args()
    begun = time.perf_counter()
    model, rows_of, old_score = opened(options.model, options.data, 48, options.heldout)
    batches = rows_of_text(Trained(options.model), options.text)
    training, other = batches[: -len(batches) // 10], batches[-len(batches) // 10 :]

    def scores(trained: Transformer) -> dict[str, float]:
        new = heldout(trained.eval(), other)["bits_per_byte"]
        return {"old text": old_score(trained), "new text": round(new, 5)}

    facts: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/new_modules.py --model {said(options.model)} --steps {options.steps}"
        f" --heldout {options.heldout}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "unit": f"bits per byte of {options.heldout} held-out rows of the old text, and of the last tenth of the new",
        "text": {path.name: sha256_of(path) for path in options.text},
        "net": dataclasses.asdict(model.config),
        "before": scores(model),
        "arms": {},
        "half": {},
    }
    for name, (student, learns) in arms(model).items():
        learn(student, training, options.steps, learns)
        facts["arms"][name] = scores(student)
        print(name, facts["arms"][name], flush=True)
    rows = rows_of(0)
    facts["half"]["pruned as it is"] = old_score(Prune(0.5)(model, rows).eval())
    for weight in (0.0, 0.1):
        few = Concentrate(keep=1.0, weight=weight, steps=options.steps)(model, rows).eval()
        entry = {"before pruning": old_score(few), "after pruning": old_score(Prune(0.5)(few, rows).eval())}
        facts["half"][f"concentrated, weight {weight}"] = entry
        print(weight, entry, flush=True)
    facts["seconds"] = round(time.perf_counter() - begun)
    write_json(options.out or RESULTS / "bench" / f"new_modules-{options.model.name}.json", facts)


def arms(model: Transformer) -> dict[str, tuple[Transformer, list[torch.nn.Parameter]]]:
    whole, experts, grown = copy.deepcopy(model), copy.deepcopy(model), Grow(experts=8)(model, [])
    return {
        "fine-tuned, all weights": (whole, list(whole.parameters())),
        "fine-tuned, experts and routers": (experts, [w for block in experts.blocks for w in block.moe.parameters()]),
        "8 new experts, the rest frozen": (grown, new_weights(grown)),
    }


def learn(model: Transformer, rows: Sequence[Batch], steps: int, learns: list[torch.nn.Parameter]) -> None:
    def loss_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        lm, routings = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
        return lm + BALANCE * mean_lbl(routings), lm

    descend(model, rows, steps, loss_of, learns=learns, lr=RATE)


def rows_of_text(trained: Trained, files: Sequence[Path]) -> list[Batch]:
    """The files' tokens, one after the other, in batches of PER_BATCH rows."""
    ids: list[int] = []
    for path in files:
        ids += [trained.end_of_text, *trained.tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False).ids]
    per_batch = PER_BATCH * LENGTH
    size_V = torch.from_numpy(token_bytes(trained.tokenizer, trained.model.config.vocab_size))
    found = []
    for first in range(0, len(ids) - per_batch, per_batch):
        window = torch.tensor(ids[first : first + per_batch + 1])
        given, target = window[:-1].view(PER_BATCH, LENGTH), window[1:].view(PER_BATCH, LENGTH)
        documents = (given == trained.end_of_text).cumsum(1)
        kinds, domains = torch.zeros_like(target, dtype=torch.uint8), torch.full((PER_BATCH,), -1)
        found.append(Batch(given, target, documents, kinds, size_V[target], domains))
    return found


if __name__ == "__main__":
    main()
