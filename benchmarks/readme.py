"""Write the results and pictures of README and book/status.md from results/, so that no number there is typed by hand.

python benchmarks/readme.py            (the pictures need kaleido and a chromium)
python benchmarks/readme.py --text     (without the pictures that need them)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hero import DARK, LIGHT, hero, says

from sigma_lite import figures
from sigma_lite.balance.metrics import load_deviation
from sigma_lite.config import ModelConfig
from sigma_lite.figures import style
from sigma_lite.lab.catalogue import WORTH
from sigma_lite.lab.results import MIDDLE, Results, read_results
from sigma_lite.lab.seeds import Difference, paired
from sigma_lite.record import read

KEPT = "freed memory kept"  # rows of train_step.py that few users of transformers would set up
OUR_LOSS, THEIRS = " + our objective", ("grouped_mm", "batched_mm", "eager")  # its other rows
ROOT = Path(__file__).parents[1]
LAB = {"fig2": ("LBL, K = 1", "LBL, K = 8 low"), "fig3": ("loss-free, K = 1 of 96",)}
LAB |= {"fig4": ("Top-1 LBL, temperature 0.1",), "better": ("scale-free LBL, temperature 0.3",)}  # of the README's table
MIXTURE = WORTH[0].name


def main() -> None:
    pictures = ROOT / "results" / "figures"
    for name, drawn in heroes().items():
        (pictures / name).write_text(drawn, "utf-8")
    if "--text" not in sys.argv:
        fig = figures.layer0_deviation(recorded("fig2"))
        figures.static_svg(fig, pictures / "lab_fig2.svg")
        figures.static_svg(fig.update_layout(template=style.DARK), pictures / "lab_fig2_dark.svg")
    for page, made in parts().items():
        path = ROOT / page
        text = path.read_text("utf-8")
        for name, part in made.items():
            before, _, rest = text.partition(begin(name))
            text = before + begin(name) + part + end(name) + rest.partition(end(name))[2]
            print(part)
        path.write_text(text, "utf-8")


def parts() -> dict[str, dict[str, str]]:
    """What stands between the marks of each page, by the marks' name."""
    readme = {"hero": first_picture(), "results": results(), "lab": lab()}
    return {"README.md": readme, "book/status.md": {"worth": differences(), "speed": speed()}}


def heroes() -> dict[str, str]:
    return {f"hero_{name}.svg": hero(hero_run(), inks) for name, inks in (("light", LIGHT), ("dark", DARK))}


def hero_run() -> dict:
    """Seed 0 of the plain balance loss at one expert per token."""
    return next(run for run in recorded("fig2")["runs"] if (run["arm"], run["seed"]) == (LAB["fig2"][0], 0))


def picture(light: str, dark: str, says: str) -> str:
    """A picture for white pages and for dark ones."""
    return f"""\
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="results/figures/{dark}">
  <img alt="{says}" src="results/figures/{light}">
</picture>
"""


def first_picture() -> str:
    run = hero_run()
    return f"""\
{picture("hero_light.svg", "hero_dark.svg", says(run))}
*Measured on held-out text: layer 0 of a small recorded run (seed {run["seed"]} of 3). Each bar is one expert.*

"""


def begin(name: str) -> str:
    return f"<!-- {name}:begin (written by benchmarks/readme.py from results/) -->\n"


def end(name: str) -> str:
    return f"<!-- {name}:end -->"


def results() -> str:
    worth = recorded("worth", "toy")
    rows = [_worth_row(name, runs) for name, runs in by_arm(worth).items()]
    xz = last_of(read(ROOT / "results" / "toy.jsonl"), "run")["data"]["xz_given_training_bits_per_byte"]
    seeds = len({run["seed"] for run in worth["runs"]})
    return f"""\
| held-out text | bits per byte | active parameters, without the embedding |
|---|---|---|
{chr(10).join(rows)}
| `xz -9e` that has read the training text | {xz:.3f} | |

Means and ranges of {seeds} seeds, after {worth["runs"][0]["tokens"] / 1e6:.1f} M tokens (more where the time is the same).
{verdict(compared(worth), price(worth), min(min(bits) for bits in scores_by_arm(worth).values()), xz)}

"""


def by_arm(found: Results) -> dict[str, list[dict]]:
    return {name: [run for run in found["runs"] if run["arm"] == name] for name in found["arms"]}


def compared(worth: Results) -> dict[str, Difference]:
    return {says: paired(worth, *pair) for says, pair in PAIRS.items()}


def price(worth: Results) -> str:
    """What one expert per token costs beside the dense model of its active size, tokens and work."""
    arms = by_arm(with_seconds(worth))
    pair = [arms[name][0] for name in PAIRS[EQUAL]]
    kept, dense = (ModelConfig(**run["config"]["net"]).ledger().non_embedding for run in pair)
    longer, time = (run["scores"]["seconds"][-1] for run in pair)
    return f"It keeps {kept / dense:.0f} times the parameters and takes {longer / time - 1:.0%} more time."


def verdict(found: dict[str, Difference], price: str, best: float, xz: float) -> str:
    """What the numbers above say, in words that follow from them."""
    clear = [f"{says}: {difference}" for says, difference in found.items() if difference.is_clear]
    if clear:
        text = f"**Clear is only this: {'; '.join(clear)}.**\n" + f"{price}\n" * found[EQUAL].is_clear
        text += f"The other {len(found) - len(clear)} comparisons are not clear,"
        text += f" and by chance one of {len(found)} would look clear in {1 - 0.95 ** len(found):.0%} of cases."
    else:
        text = "**No difference is clear**: three seeds of so short a training scatter more than these models differ."
    if xz < best:
        text += "\nA compressor that has read the training text beats all these runs."
    return text


def differences() -> str:
    """The whole comparison, for the page of the status."""
    worth, toy = with_seconds(recorded("worth", "toy")), read(ROOT / "results" / "toy.jsonl")
    run, load = last_of(toy, "run"), last_of(toy, "load")
    high, low = (float(v) for v in load_deviation(torch.tensor(load["f"][0])))
    data, widest = run["data"], max(max(bits) / min(bits) - 1 for bits in scores_by_arm(worth).values())
    against = "\n".join(f"- {says}: {difference}" for says, difference in compared(worth).items())
    spent = {name: (runs[0]["tokens"] / 1e6, runs[0]["scores"]) for name, runs in by_arm(worth).items()}
    rows = [
        f"| {name} | {tokens:.1f} | {scores['flops'][-1] / 1e12:.1f} | {scores['seconds'][-1]:.0f} |"
        for name, (tokens, scores) in spent.items()
    ]
    return f"""\
What each training took; seconds are of one core ({worth["runs"][0]["device"]}), at step times measured side by side:

| arm | million tokens | TFLOP | seconds |
|---|---|---|---|
{chr(10).join(rows)}

Held-out bits per byte of {data["heldout_bytes"] / 1e6:.2f} MB of programs, compared in pairs of one seed. Negative: the
first is better. An interval that holds 0 shows no difference; the seeds of one arm lie up to {100 * widest:.0f} % apart.

{against}

For comparison: token frequencies alone need {data["unigram_bits_per_byte"]:.3f} bits per byte, `xz -9e` that has read
nothing {data["xz_bits_per_byte"]:.3f}, and `xz -9e` that has read the training text
{data["xz_given_training_bits_per_byte"]:.3f}. {data["heldout_long_lines_in_training"]:.1%} of the held-out bytes are
lines of 20 characters or more that stand in the training text too.
The mixture has {run["ledger"]["total"] / 1e6:.1f} M parameters, embeddings included. At the end of seed 0's run the
busiest of the 96 experts of layer 0 has {1 + high:.1f} times a fair share and the idlest {1 + low:.2f} times, with a balance
loss of {load["lbl"][0]:.2f}: so few tokens do not balance so many experts.

"""


def scores_by_arm(results: Results) -> dict[str, list[float]]:
    return {name: [run["heldout"]["bits_per_byte"] for run in runs] for name, runs in by_arm(results).items()}


SAME_MODEL = {"dense, same time": "dense, same active size"}  # its steps take as long; it makes more of them
TOP1 = "mixture, K = 1 throughout"
EQUAL = "one expert per token against dense at equal active size, tokens and work"
PAIRS = {  # what is compared: (one arm, another)
    "the mixture against one expert per token throughout, which does less work": (MIXTURE, TOP1),
    "the mixture against the dense model of its active size, same tokens, less work": (MIXTURE, "dense, same active size"),
    "the mixture against the wider dense model that does the same work on the same tokens": (MIXTURE, "dense, same work"),
    "the mixture against the dense model of its active size, trained as long on one core": (MIXTURE, "dense, same time"),
    EQUAL: (TOP1, "dense, same active size"),
}


def _worth_row(name: str, runs: list[dict]) -> str:
    bits, ledger = [run["heldout"]["bits_per_byte"] for run in runs], ModelConfig(**runs[0]["config"]["net"]).ledger()
    first, last = runs[0]["active_params"]
    size = f"{last / 1e6:.2f} M" + f" of {ledger.non_embedding / 1e6:.2f} M" * (ledger.non_embedding != last)
    size += f"; {first / 1e6:.2f} M before the switch" * (first != last)
    named = name + " (`make toy`)" * (name == MIXTURE)
    return f"| {named} | {sum(bits) / len(bits):.3f} ({min(bits):.3f} to {max(bits):.3f}) | {size} |"


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
    one = recorded("fig2")["runs"][0]
    net, steps = one["config"]["net"], one["config"]["trainer"]["max_steps"]
    seeds = " to ".join(map(str, sorted({len(runs) for runs in arms.values()})))
    low, usual = (arms[name][0]["active_params"][-1] for name in ("LBL, K = 8 low", "LBL, K = 1"))
    drawn = picture("lab_fig2.svg", "lab_fig2_dark.svg", "Layer 0: busiest and idlest expert over training")
    return f"""\
{drawn}
| arm | layer 0: LBL | busiest | idlest | dead experts, all layers | held-out bits per byte |
|---|---|---|---|---|---|
{rows}

Means over {seeds} seeds; {net["n_layers"]} layers, width {net["d_model"]}, {net["n_experts"]} experts,\
 {one["tokens"] / 1e6:.1f} M tokens in {steps} steps. Loads against a fair share,
from {MIDDLE[0]:.0%} to {MIDDLE[1]:.0%} of the steps; dead experts and bits per byte on held-out text, at the
end. K = 8 low has {low / usual:.1f} times the active parameters.

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
    ]


def speed() -> str:
    """How many times as long theirs takes, by the clock: the fastest as their users run it, and with our malloc in both.

    Where all layers have one K the two differ in the objective too, so the caption names what lies between.
    """
    facts = json.loads(newest("train_step").read_text("utf-8"))
    rows = "\n".join(
        f"| {threads} | {case} | {seconds(variants)} | {' | '.join(map(times, beside(variants)))} |"
        for threads, cases in facts["results"].items()
        for case, variants in cases.items()
    )
    at_one = {threads: cases["K=1"] for threads, cases in facts["results"].items()}
    timed = [name for name in THEIRS if f"transformers {name}" in next(iter(at_one.values()))]
    untimed = f" ({', '.join(name for name in THEIRS if name not in timed)} was not timed)" * (len(timed) < len(THEIRS))
    between = [f"{fastest(variants, OUR_LOSS)['wall_times_ours']:.2f}" for variants in at_one.values()]
    return f"""\
How many times as long as ours a training step of the toy's model takes in transformers, with the faster of
{" and ".join(timed)}{untimed}; by the clock, with 95 % intervals
({facts["machine"]}). At K=1 the first column is with their own losses, the second with ours (ours without
the malloc: {" and ".join(between)}). `make bench` measures it on your machine.

| threads | experts per token | our step | transformers | with our malloc in both |
|---|---|---|---|---|
{rows}

"""


def seconds(variants: dict[str, dict]) -> str:
    return f"{variants['sigma_lite']['wall_median_s']:.3f} s"


def beside(variants: dict[str, dict]) -> tuple[dict, dict]:
    kept = next(took for name, took in variants.items() if name.startswith("transformers") and name.endswith(KEPT))
    return fastest(variants), kept


def fastest(variants: dict[str, dict], ending: str = "") -> dict:
    """Of transformers' variants whose malloc is as their users have it, with a name that ends so."""
    theirs = {name: took for name, took in variants.items() if name.startswith("transformers") and name.endswith(ending)}
    return min((t for name, t in theirs.items() if not name.endswith(KEPT)), key=lambda t: t["wall_median_s"])


def times(took: dict) -> str:
    low, high = took["wall_times_ours_95"]
    return f"{took['wall_times_ours']:.2f} ({low:.2f} to {high:.2f})"


def last_of(entries: list[dict], kind: str) -> dict:
    return [e for e in entries if e["kind"] == kind][-1]


if __name__ == "__main__":
    main()
