"""Write the README's results and pictures from results/, so that no number there is typed by hand.

python benchmarks/readme.py            (the pictures need kaleido and a chromium)
"""

from __future__ import annotations

import json
from pathlib import Path

from sigma_lite import figures
from sigma_lite.balance.metrics import load_deviation
from sigma_lite.lab.results import MIDDLE, Results, read_results
from sigma_lite.record import read

KEPT = "freed memory kept"  # rows of train_step.py that few users of transformers would set up
ROOT = Path(__file__).parents[1]
LAB = ("fig2", "fig3", "fig4", "balancers", "sparsity", "table3", "better")  # whose arms the README's table lists


def main() -> None:
    toy, dense = (read(ROOT / "results" / f"{name}.jsonl") for name in ("toy", "toy_dense"))
    pictures = ROOT / "results" / "figures"
    figures.static_svg(
        figures.compare({"96 experts, 1 active": toy, "dense, same active size": dense}), pictures / "toy.svg"
    )
    figures.static_svg(figures.deviation_band(toy, layer=0), pictures / "layer0.svg")
    figures.static_svg(figures.layer0_deviation(recorded("fig2")), pictures / "lab_fig2.svg")
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for name, part in parts(toy, dense).items():
        before, _, rest = text.partition(begin(name))
        text = before + begin(name) + part + end(name) + rest.partition(end(name))[2]
        print(part)
    readme.write_text(text, "utf-8")


def parts(toy: list[dict], dense: list[dict]) -> dict[str, str]:
    """What stands between the README's marks, by the marks' name."""
    return {"results": results(toy, dense), "lab": lab()}


def begin(name: str) -> str:
    return f"<!-- {name}:begin (written by benchmarks/readme.py from results/) -->\n"


def end(name: str) -> str:
    return f"<!-- {name}:end -->"


def results(toy: list[dict], dense: list[dict]) -> str:
    import torch

    run, last, load = last_of(toy, "run"), last_of(toy, "step"), last_of(toy, "load")
    data, ledger = run["data"], run["ledger"]
    scores = {
        "96 experts, one active (`make toy`)": last_of(toy, "validation")["bits_per_byte"],
        "dense, same active parameters, same tokens (`make dense`)": last_of(dense, "validation")["bits_per_byte"],
        "`xz -9e` on the same bytes": data["xz_bits_per_byte"],
        "token frequencies alone": data["unigram_bits_per_byte"],
    }
    rows = "\n".join(f"| {name} | {bits:.3f} |" for name, bits in scores.items())
    high, low = (float(v) for v in load_deviation(torch.tensor(load["f"][0])))
    return f"""\
![Held-out bits per byte and training loss of the toy and its dense twin](results/figures/toy.svg)

| held-out text, {data["heldout_bytes"] / 1e6:.2f} MB of Python that was not trained on | bits per byte |
|---|---|
{rows}

The toy has {ledger["total"] / 1e6:.1f} M parameters; {ledger["active_initial"] / 1e6:.2f} M work per token before the
switch and {ledger["active_target"] / 1e6:.2f} M after it (embeddings aside). It saw {last["tokens"] / 1e6:.1f} M tokens in
{last["seconds"] / 60:.0f} minutes of training on {run["device"]}. At its end the
busiest of the 96 experts of layer 0 had {1 + high:.1f} times a fair share and the idlest {1 + low:.2f} times, with a
balancing loss of {load["lbl"][0]:.2f} there, where 1.00 means balanced. So few tokens do not balance so many experts, and
that is the subject of what comes next:

![Load deviation of layer 0](results/figures/layer0.svg)

The training step of the same model in transformers takes {speed()}

"""


def recorded(name: str) -> Results:
    return read_results(ROOT / "results" / "lab" / f"{name}-cpu.json")


def lab() -> str:
    """One line an arm: layer 0 in the middle of the run, held-out score at its end; means over seeds."""
    arms: dict[str, list[dict]] = {}
    for name in LAB:
        for run in recorded(name)["runs"]:
            if all(run["seed"] != other["seed"] for other in arms.setdefault(run["arm"], [])):
                arms[run["arm"]].append(run)
    rows = "\n".join(f"| {name} | {' | '.join(_cells(runs))} |" for name, runs in arms.items())
    one = recorded("fig2")["runs"][0]
    net, steps = one["config"]["net"], one["config"]["trainer"]["max_steps"]
    return f"""\
![Layer 0: busiest and idlest expert over training](results/figures/lab_fig2.svg)

| arm | layer 0: LBL | busiest | idlest | dead experts, all layers | held-out bits per byte | seeds |
|---|---|---|---|---|---|---|
{rows}

{net["n_layers"]} layers, width {net["d_model"]}, {net["n_experts"]} experts where not said otherwise,
{one["tokens"] / 1e6:.1f} M tokens in {steps} steps on {one["device"]}. Loads are those of the middle of the run
({MIDDLE[0]:.0%} to {MIDDLE[1]:.0%} of its steps, {one["middle"]["tokens"] / 1e3:.0f}k tokens), relative to a fair share;
dead experts and bits per byte those of held-out text at the end. Converted arms are another model in the middle than at
the end, so their loads are left out.

"""


def _cells(runs: list[dict]) -> list[str]:
    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    loads = [
        f"{mean(run['middle']['lbl'][0] for run in runs):.3f}",
        *(f"{mean(run['middle'][side][0] for run in runs):+.0%}".replace("-", "\u2212") for side in ("max", "min")),
    ]
    switched = runs[0]["k"][0] != runs[0]["k"][1]  # then the middle of the run is another model's
    return [
        *(["" if switched else cell for cell in loads]),
        f"{mean(sum(run['heldout']['dead']) for run in runs):.0f}",
        f"{mean(run['heldout']['bits_per_byte'] for run in runs):.4f}",
        str(len(runs)),
    ]


def speed() -> str:
    found = sorted((ROOT / "results" / "bench").glob("train_step-*.json"))
    if not found:
        return "a time that has not been measured yet."
    facts = json.loads(found[-1].read_text("utf-8"))
    parts = []
    for case, variants in facts["results"].items():
        theirs = {n: v for n, v in variants.items() if n.startswith("transformers")}
        kept = next(v["times_ours"] for n, v in theirs.items() if n.endswith(KEPT))
        name, best = min(((n, v) for n, v in theirs.items() if not n.endswith(KEPT)), key=lambda pair: pair[1]["median_s"])
        low, high = best["times_ours_95"]
        interval = f"95 % interval {low:.2f} to {high:.2f}; with our setting of malloc theirs takes {kept:.2f} times as long"
        parts.append(f"{best['times_ours']:.2f} times as long as ours at {case} ({interval}; theirs: {name})")
    return "; ".join(parts) + f". {facts['machine']}; `make bench` measures it on yours."


def last_of(entries: list[dict], kind: str) -> dict:
    return [e for e in entries if e["kind"] == kind][-1]


if __name__ == "__main__":
    main()
