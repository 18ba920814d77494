"""Write the README's results and pictures from results/, so that no number there is typed by hand.

python benchmarks/readme.py            (the pictures need kaleido and a chromium)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sigma_lite import figures
from sigma_lite.balance.metrics import load_deviation
from sigma_lite.config import ModelConfig
from sigma_lite.lab.catalogue import WORTH
from sigma_lite.lab.results import MIDDLE, Results, read_results
from sigma_lite.lab.seeds import paired
from sigma_lite.record import read

KEPT = "freed memory kept"  # rows of train_step.py that few users of transformers would set up
ROOT = Path(__file__).parents[1]
LAB = {"fig2": ("LBL, K = 1", "LBL, K = 8 low"), "fig3": ("loss-free, K = 1 of 96",)}
LAB |= {"fig4": ("Top-1 LBL, temperature 0.1",), "better": ("scale-free LBL, temperature 0.3",)}  # of the README's table
MIXTURE = WORTH[0].name


def main() -> None:
    pictures = ROOT / "results" / "figures"
    figures.static_svg(figures.bits_against(with_seconds(recorded("worth", "toy"))), pictures / "worth.svg")
    figures.static_svg(figures.deviation_band(read(ROOT / "results" / "toy.jsonl"), layer=0), pictures / "layer0.svg")
    figures.static_svg(figures.layer0_deviation(recorded("fig2")), pictures / "lab_fig2.svg")
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for name, part in parts().items():
        before, _, rest = text.partition(begin(name))
        text = before + begin(name) + part + end(name) + rest.partition(end(name))[2]
        print(part)
    readme.write_text(text, "utf-8")


def parts() -> dict[str, str]:
    """What stands between the README's marks, by the marks' name."""
    return {"results": results(), "lab": lab(), "speed": speed()}


def begin(name: str) -> str:
    return f"<!-- {name}:begin (written by benchmarks/readme.py from results/) -->\n"


def end(name: str) -> str:
    return f"<!-- {name}:end -->"


def results() -> str:
    worth, toy = with_seconds(recorded("worth", "toy")), read(ROOT / "results" / "toy.jsonl")
    run, load = last_of(toy, "run"), last_of(toy, "load")
    data, ledger = run["data"], run["ledger"]
    rows = [_worth_row(name, [run for run in worth["runs"] if run["arm"] == name]) for name in worth["arms"]]
    bits = {
        "`xz -9e` that has read the training text": data["xz_given_training_bits_per_byte"],
        "`xz -9e` that has read nothing": data["xz_bits_per_byte"],
        "token frequencies alone": data["unigram_bits_per_byte"],
    }
    rows += [f"| {name} | {value:.3f} | | | | |" for name, value in bits.items()]
    high, low = (float(v) for v in load_deviation(torch.tensor(load["f"][0])))
    differences = {says: paired(worth, *pair) for says, pair in PAIRS.items()}
    against = "\n".join(f"- {says}: {difference}" for says, difference in differences.items())
    clear = [says for says, difference in differences.items() if difference.is_clear]
    one = worth["runs"][0]
    megabytes, copied = data["heldout_bytes"] / 1e6, data["heldout_long_lines_in_training"]
    seeds = len({run["seed"] for run in worth["runs"]})
    widest = max(max(bits) / min(bits) - 1 for bits in scores_by_arm(worth).values())
    return f"""\
![Held-out bits per byte of the mixture and its dense twins](results/figures/worth.svg)

| held-out text: {megabytes:.2f} MB of programs | bits per byte | active parameters | all | TFLOP | seconds |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Mean over {seeds} seeds and, in brackets, their range. Parameters leave out the embedding. TFLOP are of the whole training;
seconds are of one core ({one["device"]}), at step times measured side by side.
{copied:.1%} of the held-out bytes are lines of 20 characters or more that stand in the training text too. Held-out
bits per byte compared in pairs of one seed (negative: the first is better; an interval that holds 0 shows no
difference; the seeds of one arm lie up to {100 * widest:.0f} % apart):

{against}

{verdict(clear, min(min(bits) for bits in scores_by_arm(worth).values()), data["xz_given_training_bits_per_byte"])}

The mixture has {ledger["total"] / 1e6:.1f} M parameters, embeddings included, and sees {one["tokens"] / 1e6:.1f} M tokens.
At the end of seed 0's run the busiest of the 96 experts of layer 0 has {1 + high:.1f} times a fair share and the idlest
{1 + low:.2f} times,
with a balance loss of {load["lbl"][0]:.2f} there, where 1.00 means balanced. So few tokens do not balance so many experts,
and that is the subject of what comes next.

"""


def verdict(clear: list[str], best: float, xz: float) -> str:
    """What the numbers above say, in words that follow from them."""
    if clear:
        text = f"**Clear with three seeds: {'; '.join(clear)}.** The other differences are not.\n"
        text += (
            f"And of {len(PAIRS)} such intervals, one would miss 0 by chance alone in {1 - 0.95 ** len(PAIRS):.0%} of cases."
        )
    else:
        text = "**So at this length the answer is: nobody can tell.** No interval lies on one side of 0: three seeds of so"
        text += (
            "\nshort a training scatter more than these models differ. The toy shows how a mixture trains, not that it pays."
        )
    if xz < best:
        text += "\nAnd the compressor that has read the training text beats every one of these runs."
    return text


def scores_by_arm(results: Results) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for run in results["runs"]:
        scores.setdefault(run["arm"], []).append(run["heldout"]["bits_per_byte"])
    return scores


SAME_MODEL = {"dense, same time": "dense, same active size"}  # its steps take as long; it makes more of them
TOP1 = "mixture, K = 1 throughout"
PAIRS = {  # what is compared: (one arm, another)
    "the mixture against one expert per token throughout, which does less work": (MIXTURE, TOP1),
    "the mixture against the dense model of its active size, same tokens, less work": (MIXTURE, "dense, same active size"),
    "the mixture against the wider dense model that does the same work on the same tokens": (MIXTURE, "dense, same work"),
    "the mixture against the dense model of its active size, trained as long on one core": (MIXTURE, "dense, same time"),
    "one expert per token throughout against the dense model, at equal active size, tokens and work": (
        TOP1,
        "dense, same active size",
    ),
}


def _worth_row(name: str, runs: list[dict]) -> str:
    bits = [run["heldout"]["bits_per_byte"] for run in runs]
    ledger, scores = ModelConfig(**runs[0]["config"]["net"]).ledger(), runs[0]["scores"]
    first, last = runs[0]["active_params"]
    active = f"{last / 1e6:.2f} M" + (f", {first / 1e6:.2f} M before the switch" if first != last else "")
    spent = f"{scores['flops'][-1] / 1e12:.1f} | {scores['seconds'][-1]:.0f}"
    score = f"{sum(bits) / len(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"
    named = name + " (`make toy`)" * (name == MIXTURE)
    return f"| {named} | {score} | {active} | {ledger.non_embedding / 1e6:.2f} M | {spent} |"


def with_seconds(worth: Results) -> Results:
    """The same with seconds of one core at each validation: steps times what a step takes, measured side by side."""
    measured = json.loads(newest("step_times").read_text("utf-8"))["results"]
    for run in worth["runs"]:
        name = SAME_MODEL.get(run["arm"], run["arm"])
        after = measured[name]["median_s"]
        before = measured.get(f"{name}, before its switch", {"median_s": after})["median_s"]
        switch = run["config"]["sparsity"]["switch_step"]
        run["scores"]["seconds"] = [min(s, switch) * before + max(0, s - switch) * after for s in run["scores"]["step"]]
    return worth


def newest(what: str) -> Path:
    return sorted((ROOT / "results" / "bench").glob(f"{what}-*.json"))[-1]


def recorded(name: str, scale: str = "cpu") -> Results:
    return read_results(ROOT / "results" / "lab" / f"{name}-{scale}.json")


def lab() -> str:
    """One line an arm: layer 0 in the middle of the run, held-out score at its end; means over seeds."""
    arms = {arm: [run for run in recorded(name)["runs"] if run["arm"] == arm] for name, own in LAB.items() for arm in own}
    rows = "\n".join(f"| {name} | {' | '.join(_cells(runs))} |" for name, runs in arms.items())
    one, commits = recorded("fig2")["runs"][0], {run["commit"] for runs in arms.values() for run in runs}
    origin = f"All rows come from commit {one['commit']}" if len(commits) == 1 else f"Rows come from {len(commits)} commits"
    net, steps = one["config"]["net"], one["config"]["trainer"]["max_steps"]
    return f"""\
![Layer 0: busiest and idlest expert over training](results/figures/lab_fig2.svg)

| arm | layer 0: LBL | busiest | idlest | dead experts, all layers | held-out bits per byte | seeds |
|---|---|---|---|---|---|---|
{rows}

{net["n_layers"]} layers, width {net["d_model"]}, {net["n_experts"]} experts,
{one["tokens"] / 1e6:.1f} M tokens in {steps} steps on {one["device"]}. Loads are those of the middle of the run
({MIDDLE[0]:.0%} to {MIDDLE[1]:.0%} of its steps, {one["middle"]["tokens"] / 1e3:.0f}k tokens), relative to a fair share;
dead experts and bits per byte those of held-out text at the end. {origin}; the held-out
text is split by file, tables and near-duplicates included. All arms and what they show:
[chapter 16](notebooks/16_your_own_loss.ipynb).

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
    facts, said = json.loads(newest("train_step").read_text("utf-8")), []
    for case, variants in facts["results"].items():
        theirs = {n: v for n, v in variants.items() if n.startswith("transformers")}
        kept = next(v["times_ours"] for n, v in theirs.items() if n.endswith(KEPT))
        name, best = min(((n, v) for n, v in theirs.items() if not n.endswith(KEPT)), key=lambda pair: pair[1]["median_s"])
        low, high = best["times_ours_95"]
        more = f"95 % interval {low:.2f} to {high:.2f}; {kept:.2f} times with our setting of malloc in both"
        theirs = name.removeprefix("transformers ")
        said.append(f"{best['times_ours']:.2f} times as long as ours at {case} ({more}; theirs: {theirs})")
    return f"""\
The training step of the toy's model in transformers takes {"; ".join(said)}.
{facts["machine"]}; `make bench` measures it on yours.

"""


def last_of(entries: list[dict], kind: str) -> dict:
    return [e for e in entries if e["kind"] == kind][-1]


if __name__ == "__main__":
    main()
