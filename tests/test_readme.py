"""The README says what is: its numbers come from results/, its links lead somewhere, its configs load, its tree exists."""

import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import torch

import sigma_lite
from sigma_lite import cli, loop
from sigma_lite.balance.objective import objective
from sigma_lite.data import shards
from sigma_lite.data.rows import Rows, train_loader
from sigma_lite.lab import read_results
from sigma_lite.lab.catalogue import WORTH
from sigma_lite.model import Transformer
from sigma_lite.record import read
from sigma_lite.runfile import ALONE, GROUPS, load_run, overrides, split_files
from sigma_lite.teach.session import CHAPTERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for page in (README, (ROOT / "book" / "runs.md").read_text("utf-8"))
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    for line in block.splitlines()
    if line.startswith("sigma-lite")
]


@pytest.fixture(scope="module")
def written():
    """benchmarks/readme.py, which writes the pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_its_numbers_are_those_of_the_recorded_runs(written):
    for page, parts in written.parts().items():
        text = (ROOT / page).read_text("utf-8")
        for name, part in parts.items():
            assert written.begin(name) + part + written.end(name) in text, "run benchmarks/readme.py"


def test_numbers_of_the_status_are_those_of_the_benchmarks():
    text = (ROOT / "book" / "status.md").read_text("utf-8")

    def bench(name: str) -> dict:
        return json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text("utf-8"))

    attention = bench("documents-x86_64-2cpu")["results"]["attention"]
    times = [case["times_blocks"]["seconds"] for cases in attention.values() for case in cases.values()]
    assert f"takes {min(times):.1f} to {max(times):.1f} times as long" in text
    placed = bench("placement-x86_64-2cpu")["lab"]["fig2: LBL, K = 1"]
    assert f"{placed['where stored']:.2f} times an even share" in text
    assert f"{placed['EPLB of the last window']:.2f} times with EPLB's plan" in text
    hits = bench("offload-x86_64-2cpu")["hit_rate"]["8"]["lru"]
    assert f"{100 * min(hits):.0f} % to {100 * max(hits):.0f} % of the choices" in text
    split = bench("dense2moe-dense")
    for by in ("taylor", "random"):
        bits = [one["after distillation"]["2"] for one in split["splits"] if one["by"] == by]
        assert f"{min(bits):.3f} to {max(bits):.3f} after a {by.replace('taylor', 'Taylor')}" in text
    half = "50% of each layer's experts"
    bits = {row["name"]: row["bits_per_byte"] for row in bench("compression-sparse")["rows"]}
    above = {name: value - bits["as trained"] for name, value in bits.items()}
    assert f"pruned +{above[half]:.4f} bits per byte" in text
    assert "INT8 less than 0.0001" in text and abs(above["INT8, a scale a row"]) < 1e-4
    assert f"INT4 +{above['INT4, a scale a row']:.4f}" in text
    bits = {row["name"]: row["bits_per_byte"] for row in bench("compression-reference")["rows"] if row["kind"] != "merge"}
    above = {name: value - bits["as trained"] for name, value in bits.items()}
    assert f"INT8 costs +{above['INT8, a scale a row']:.4f} bits per byte, INT4 +{above['INT4, a scale a row']:.4f}" in text
    quarter = above["75% of each layer's experts"]
    assert f"a quarter of each layer's experts pruned +{quarter:.4f}, half of them +{above[half]:.4f}" in text
    assert above["INT8, a scale a row"] < 0.005 * bits["as trained"]
    modules = bench("new_modules-sparse")
    new, all_weights = (modules["arms"][arm] for arm in ("8 new experts, the rest frozen", "fine-tuned, all weights"))
    for kind, verb in (("old text", "bits per byte, "), ("new text", "")):
        said = f"{kind} {new[kind]:.2f} against {all_weights[kind]:.2f} {verb}".strip().removesuffix(",")
        assert f"{said}, {modules['before'][kind]:.2f} before" in text


def test_its_first_picture_is_drawn_from_the_recorded_run(written):
    for name, drawn in written.heroes().items():
        assert (ROOT / "results" / "figures" / name).read_text("utf-8") == drawn, "run benchmarks/readme.py"
        assert name in README


def test_its_first_picture_can_be_read_on_a_white_and_on_a_dark_page(written):
    """WCAG: words 4.5:1, bars and lines 3:1."""
    for inks, page in ((written.LIGHT, "#ffffff"), (written.DARK, "#0d1117")):
        assert min(contrast(ink, page) for ink in (inks.text, inks.muted)) >= 4.5
        assert min(contrast(ink, page) for ink in (inks.experts, inks.chosen)) >= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_stays_short_and_three_commands_open_a_notebook():
    words = len(re.findall(r"\w+", README))  # the strictest count: of an address each part is a word
    assert len(README.split()) <= words <= 1600 and len(README.split()) >= 1150
    first = re.search(r"```bash\n(.*?)```", README, re.S)[1].splitlines()
    assert [line.split()[:2] for line in first[:3]] == [["git", "clone"], ["cd", "sigma_lite"], ["make", "lab"]]
    opened = re.search(r"^lab:.*\n\t.*jupyter lab (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)[1]
    assert (ROOT / opened).is_file() and "chapter 1 opens" in first[2] and "/01_" in opened


def test_every_chapter_stands_in_it_once_by_its_number():
    table = re.findall(r"^\| \[(\d+) ([^]]+)\]\(notebooks/([^)]+)\)", README, re.M)
    assert [name for *_, name in table] == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [int(number) for number, *_ in table] == [int(name[:2]) for *_, name in table]
    assert [title for _, title, _ in table] == [CHAPTERS[int(number)].title for number, *_ in table]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_the_program_takes_its_commands(command):
    """As far as they can be read without the runs that they name."""
    _, name, *args = shlex.split(command)
    assert name in cli.COMMANDS
    if name not in cli.TRAINER_COMMANDS:
        options, rest = cli._parser().parse_known_args([name, *args])
        cli._only_overrides(options, rest)
        return
    files, rest = split_files(args)
    run = load_run([ROOT / file for file in files], overrides(rest), fit=True)
    assert run != load_run([ROOT / file for file in files], fit=True), "it changes nothing"
    for key in (arg[2:].partition("=")[0] for arg in rest if arg.startswith("--")):
        assert key.split(".")[0] in (GROUPS if "." in key else ALONE), key


def test_a_token_passes_the_files_that_are_listed(corpus_and_data, monkeypatch):
    """From the row to the loss: what runs in loop.train before the first backward."""
    monkeypatch.setenv("SIGMA_LITE_BACKEND", "loop")
    home, run, ran = Path(sigma_lite.__file__).parent, load_run([], tiny.settings()), {}
    data = shards.load(corpus_and_data / "prepared")
    batches = train_loader(Rows(data.train, data.token_bytes, run.rows.length), run.rows, steps=1)
    step = loop.train(Transformer(run.net), batches, objective(run.balance, run.net.n_layers), run.optim, steps=1, micros=2)

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and home in path.parents and (ran or path.name == "rows.py"):
            ran.setdefault(path.relative_to(home).as_posix(), set()).add(frame.f_code)

    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args: (sys.setprofile(None), backward(*args)))
    sys.setprofile(note)
    try:
        next(step)
    finally:
        sys.setprofile(None)

    section = README.partition("## The way of one token")[2].partition("##")[0]
    *_, listed = section.strip().splitlines()
    assert sorted(re.findall(r"`([\w/.]+)`", listed)) == sorted(ran)
    said, long, short = (int(n.replace(",", "")) for n in re.search(
        r"passes (\d+) files .*about ([\d,]+) lines,\s+of which some (\d+) run", section, re.S).groups())  # fmt: skip
    assert said == len(ran)
    assert long == pytest.approx(sum(len((home / name).read_text("utf-8").splitlines()) for name in ran), rel=0.1)
    sources = [(name, *inspect.getsourcelines(code)) for name, codes in ran.items() for code in codes]
    assert short == pytest.approx(len({(name, at + n) for name, lines, at in sources for n in range(len(lines))}), rel=0.1)


def test_the_recorded_comparison_is_a_fair_one():
    """One clean commit, one machine, three seeds; every arm on the same text, and the twins as large or as long as named."""
    worth = read_results(ROOT / "results" / "lab" / "worth-toy.json")
    arms = {name: [run for run in worth["runs"] if run["arm"] == name] for name in worth["arms"]}
    assert set(arms) == {arm.name for arm in WORTH}
    assert all({run["seed"] for run in runs} == {0, 1, 2} for runs in arms.values())
    assert len({run["commit"] for run in worth["runs"]}) == len({run["device"] for run in worth["runs"]}) == 1
    assert not worth["runs"][0]["commit"].endswith("-dirty")
    for run in worth["runs"]:
        for part in ("corpus", "rows", "optim"):
            assert without_seed(run["config"][part]) == without_seed(worth["runs"][0]["config"][part])
        assert not [event for event in run["events"] if event["what"] == "step skipped"]
    mixture = arms["mixture"][0]
    assert arms["dense, same active size"][0]["active_params"][1] == pytest.approx(mixture["active_params"][1], rel=5e-3)
    assert arms["dense, same work"][0]["scores"]["flops"][-1] == pytest.approx(mixture["scores"]["flops"][-1], rel=5e-3)


def without_seed(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "seed"}


def test_the_toys_diary_is_that_of_the_mixture():
    toy = read(ROOT / "results" / "toy.jsonl")
    recorded = read_results(ROOT / "results" / "lab" / "worth-toy.json")["runs"]
    mixture = next(run for run in recorded if (run["arm"], run["seed"]) == ("mixture", 0))
    assert [e for e in toy if e["kind"] == "validation"][-1]["bits_per_byte"] == mixture["heldout"]["bits_per_byte"]


def test_its_links_lead_to_files():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_tree_exists():
    tree = README.split("```")[[i for i, part in enumerate(README.split("```")) if part.startswith("\nsigma_lite/")][0]]
    rooms = re.findall(r"^  (?:[\w.]+\.py|\w+/)(?: \w+/)*", tree, flags=re.M)
    names = [name for room in rooms for name in room.split()]
    assert [name for name in names if not (ROOT / "sigma_lite" / name).exists()] == []
    rooms = {f"{path.parent.name}/" for path in (ROOT / "sigma_lite").glob("*/__init__.py")}
    assert rooms - set(names) == set(), "rooms that it leaves out"


@pytest.mark.parametrize("path", sorted((ROOT / "scaled_configs").glob("*.yaml")), ids=lambda p: p.name)
def test_its_configs_load(path):
    load_run([path])
    for overlay in (path.parent / "overlays").glob("*.yaml"):
        load_run([path, overlay])


def test_the_guide_has_the_minutes_of_the_chapters():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import timings
    guide = (ROOT / "book" / "instructor.md").read_text("utf-8")
    assert timings.BEGIN + timings.table() + timings.END in guide, "run benchmarks/timings.py"


def test_the_page_of_platforms_says_what_is_there():
    page = (ROOT / "book" / "platforms.md").read_text("utf-8")
    makefile, extras = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "pyproject.toml"))
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))["postCreateCommand"]
    assert f"`{container}`" in page and container == "make .venv/.full" and "\n$(VENV)/.full:" in makefile
    constraints, package = (ROOT / ".binder" / "requirements.txt").read_text("utf-8").splitlines()
    assert (ROOT / ".binder" / constraints.removeprefix("-c ")).is_file()
    assert package == "-e .[notebooks]" and '-e ".[notebooks]"' in page and "\nnotebooks = [" in extras
    assert "conda env create -f environment.yml" in page and (ROOT / "environment.yml").is_file()
    assert "`.binder/`" in page and (ROOT / ".binder" / "runtime.txt").read_text("utf-8") == "python-3.11\n"
