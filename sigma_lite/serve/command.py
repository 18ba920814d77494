"""`sigma-lite generate|chat|eval|rows|export|import`: on a finished run. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

PROMPT = "import os\n\ndef"  # ends where a token ends: BPE puts the space before a name into the name's token
Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_commands(command: Command, path: Callable[[str], Path]) -> None:
    """The parsers of these commands; `path` reads a file or folder."""

    def on_run(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = command(name, run, text)
        add_run(sub, path)
        return sub

    sub = on_run("generate", _generate, "Let a trained model continue one text or several.")
    sub.add_argument(
        "--prompt", action="append", help=f"text to continue; several are written together (default: {PROMPT!r})"
    )
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="of each prompt, with seeds of their own")
    sub.add_argument("--experts", action="store_true", help="show the experts of each token, layer by layer")
    _add_sampling(sub, temperature=0.8)

    sub = on_run("chat", _chat, "Talk with a model, line by line; an empty line or the end of the input ends it.")
    _add_sampling(sub, temperature=0.7)

    sub = on_run("eval", _eval, "Score a run: likelihood, generated tasks, code, and what its experts know.")
    sub.add_argument(
        "TASK",
        nargs="+",
        help="heldout | specialisation | ablation (of held-out text); drift (from an earlier run, see --against); add2,"
        " sort5, reverse6, two_step5 (with any number of digits); sigma_text, sigma_choice, sigma_code; a file of JSON lines"
        " (text; query, choices, gold; prompt, check)",
    )
    sub.add_argument("--tokens", type=int, help="of held-out text (default: all; specialisation 30000, ablation 4096)")
    sub.add_argument("--problems", type=int, default=200, help="of a generated task (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of these problems (default: %(default)s)")
    sub.add_argument("--against", type=path, help="drift: folder of the earlier run (default: the one that RUN began from)")
    sub.add_argument("--no-execute", action="store_true", help="only parse code that the model writes, do not run it")

    sub = command("rows", _rows, "Name the rows of one training step: source, epoch, number and documents.")
    sub.add_argument("RUN", type=path, help="folder of the run, such as runs/toy")
    sub.add_argument("STEP", type=int, help="as the run's record.jsonl counts: the first is 1")
    sub.add_argument("--json", action="store_true", help="one JSON object a row")

    sub = on_run("export", _export, "Write a run as a Hugging Face folder (Qwen3-MoE, or Qwen3 for one expert).")
    sub.add_argument("OUT", type=path, help="a new folder for config, safetensors, tokenizer and model card")
    sub.add_argument(
        "--dtype", default="float32", help="float32 | bfloat16 | int8 (for this package) (default: %(default)s)"
    )
    sub.add_argument("--shard", default="5GB", help="most bytes of one file (default: %(default)s)")

    sub = command("import", _import, "Make a run of a Hugging Face folder with Qwen3-MoE or Qwen3 weights.")
    sub.add_argument("FOLDER", type=path, help="holds config.json and safetensors; no code in it is run")
    sub.add_argument("OUT", type=path, help="folder of the new run")


def add_run(sub: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """RUN and what else `opened` takes."""
    sub.add_argument(
        "RUN", type=path, help="folder of a run or of Hugging Face weights; or reference, the model in this package"
    )
    sub.add_argument("--data", type=path, help="folder with another tokenizer.json (default: the run's own)")
    sub.add_argument(
        "--own-parts",
        action="store_true",
        help="also run code that is not of this package, where the run names such as its model.parts",
    )


def opened(options: argparse.Namespace):
    """The model that a command works with."""
    from sigma_lite.serve.trained import Trained

    resident = getattr(options, "resident", None)
    return Trained(options.RUN, options.data, own_code=options.own_parts, resident=resident)


def _add_sampling(sub: argparse.ArgumentParser, temperature: float) -> None:
    default = "(default: %(default)s)"
    sub.add_argument("--max-new-tokens", type=int, default=200, help=f"of one text {default}")
    sub.add_argument("--temperature", type=float, default=temperature, help=f"0 is greedy {default}")
    sub.add_argument("--top-k", type=int, default=0, help=f"draw among the k most probable tokens; 0: all {default}")
    sub.add_argument("--top-p", type=float, default=0.95, help=f"among those that hold this probability together {default}")
    sub.add_argument("--min-p", type=float, default=0.0, help=f"with at least this share of the largest one {default}")
    sub.add_argument("--seed", type=int, default=0, help=default.strip("()"))
    sub.add_argument("--resident", type=int, help="experts of each layer in memory; others are read when a token needs them")
    sub.add_argument("--stop", action="append", default=[], help="another token that ends a text, such as '<|end|>'")


def _generate(options: argparse.Namespace) -> None:
    from sigma_lite.serve.write import write

    trained = opened(options)
    write(trained, options.prompt or [PROMPT], options)
    if trained.offloaded:
        print(f"sigma-lite: {trained.offloaded.in_words()}", file=sys.stderr)


def _chat(options: argparse.Namespace) -> None:
    from sigma_lite.serve.write import chat

    chat(opened(options), options)


def _eval(options: argparse.Namespace) -> None:
    from sigma_lite.serve.evaluate import Options, evaluate, keep, require_known, summary

    for task in options.TASK:
        require_known(task)
    data = options.data if options.data and (options.data / "manifest.json").is_file() else None
    chosen = Options(data, options.tokens, options.problems, options.seed, not options.no_execute, options.against)
    trained, kept = opened(options), None
    for task in options.TASK:
        found = evaluate(trained, task, chosen)
        for line in summary(task, found):
            print(line)
        kept = keep(options.RUN, trained, task, found)
    if kept:
        print(f"sigma-lite: kept in {kept}; `sigma-lite report {options.RUN}` draws it", file=sys.stderr)


def _rows(options: argparse.Namespace) -> None:
    from sigma_lite.serve.rows import rows_of_step

    rows = rows_of_step(options.RUN, options.STEP)
    if options.json:
        print("\n".join(map(json.dumps, rows)))
        return
    print(f"{'row':>4}  {'source':<12} {'epoch':>5} {'number':>9}  documents")
    for place, row in enumerate(rows):
        names = ", ".join(row["documents"][:4]) + (f" and {n} more" if (n := len(row["documents"]) - 4) > 0 else "")
        print(f"{place:>4}  {row['source']:<12} {row['epoch']:>5} {row['row']:>9}  {names}")


def _export(options: argparse.Namespace) -> None:
    from sigma_lite.serve.export import export

    print(f"export        {export(options.RUN, options.OUT, dtype=options.dtype, data=options.data, shard=options.shard)}")


def _import(options: argparse.Namespace) -> None:
    from sigma_lite.serve.imports import import_model

    net = import_model(options.FOLDER, options.OUT)
    experts = "dense" if net.n_experts == 1 else f"{net.n_experts} experts, {net.top_k} per token"
    print(f"import        {options.OUT}: {net.n_layers} layers of width {net.d_model}, {experts}")
