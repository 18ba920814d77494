"""How often does what a model writes parse as Python? Against a smoothed 5-gram model over the same tokens.

Both continue the same prompts, the headers of functions in held-out modules (`def name(arguments):`), by the same number of
tokens, drawn in the same way from their probabilities. A continuation is cut to whole lines, and where the function ends
(`answers.body`); it counts if something is left and Python's own parser takes header and body. The 5-gram model has counted
the training text of the model. Needs the prepared data of the run. Writes results/bench/parses-NAME.json.

    python benchmarks/parses.py RUN [--data FOLDER] [--prompts 300] [--tokens 96] [--temperature 1.0 0.7]
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sigma_lite.data import shards
from sigma_lite.data.ngram import NGram
from sigma_lite.data.shards import Prepared
from sigma_lite.data.tokenizer import token_strings
from sigma_lite.serve.answers import body, parses
from sigma_lite.serve.generate import Sampling, draw_each, generate
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import write_json

ROOT = Path(__file__).parents[1]
Write = Callable[[Sequence[Sequence[int]], int, Sampling], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("RUN", type=Path, help="folder of a run, or reference")
    parser.add_argument("--data", type=Path, help="folder of the prepared corpus (default: the run's own)")
    parser.add_argument("--prompts", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of a continuation (default: %(default)s)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.7], help="(default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trained = Trained(options.RUN)
    data = shards.load(options.data or trained.settings["corpus"]["dir"])
    facts = compare(trained, data, options.prompts, options.tokens, options.temperature)
    out = options.out or ROOT / "results" / "bench" / f"parses-{options.RUN.resolve().name}.json"
    write_json(out, facts | {"run": options.RUN.name, "step": trained.step})
    print(json.dumps(facts["parses"], indent=1), f"\nwritten to {out}")


def compare(trained: Trained, data: Prepared, prompts: int, tokens: int, temperatures: Sequence[float]) -> dict:
    """Share of continuations that parse, of each writer and temperature, and the standard error of the paired difference."""
    given = headers(data, prompts)
    ids = [trained.prompt_ids(header) for header in given]
    counted = NGram(data.train.read(0, len(data.train))[0].astype(np.int64), data.vocab_size)
    end = trained.end_of_text
    writers: dict[str, Write] = {
        "model": lambda ids, n, sampling: [
            own.tokens for own in generate(trained.model, ids, max_new_tokens=n, sampling=sampling, stop={end})
        ],
        "5-gram": lambda ids, n, sampling: [
            by_counting(counted, own, n, sampling, end, seed) for seed, own in enumerate(ids)
        ],
    }
    found: dict = {}
    for temperature in temperatures:
        sampling, good = Sampling(temperature, top_p=1.0), {}
        for name, write in writers.items():
            written = ["".join(trained.texts(own)) for own in write(ids, tokens, sampling)]
            good[name] = np.array([is_function(header, text) for header, text in zip(given, written, strict=True)])
        gap = good["model"].astype(float) - good["5-gram"]
        found[str(temperature)] = {name: float(own.mean()) for name, own in good.items()}
        found[str(temperature)] |= {"gap": float(gap.mean()), "standard_error": float(gap.std() / len(gap) ** 0.5)}
    return {"parses": found, "prompts": len(given), "tokens": tokens}


def is_function(header: str, written: str) -> bool:
    """Whether the whole lines that were written are a body of the function."""
    whole = body(written.rpartition("\n")[0] + "\n")
    return bool(whole.strip()) and parses(header + whole)


def headers(data: Prepared, count: int) -> list[str]:
    """Of functions at the top of held-out modules, drawn evenly: `def f(x):`, on one line.

    Without the line's end: BPE makes that one token with the indentation behind it.
    """
    words, found = token_strings(data.tokenizer), []
    ids, start = data.heldout.read(0, len(data.heldout))[0], 0
    for facts in (own for own in data.documents() if own["split"] == "heldout"):
        text = b"".join(map(words.__getitem__, ids[start : start + facts["tokens"]].tolist())).decode()
        start += facts["tokens"]
        if facts["name"].endswith(".py") and parses(text):
            lines = text.split("\n")
            nodes = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
            found += [lines[node.lineno - 1] for node in nodes if lines[node.lineno - 1].endswith(":")]
    return random.Random(0).sample(sorted({*found}), min(count, len({*found})))


def by_counting(model: NGram, prompt: Sequence[int], count: int, sampling: Sampling, end: int, seed: int) -> list[int]:
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits_V = torch.from_numpy(np.log(model.probs(ids))).float()
        token = int(draw_each(logits_V[None], sampling, [generator])[0])
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


if __name__ == "__main__":
    main()
