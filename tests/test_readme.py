"""The README says what is: its numbers come from results/, its links lead somewhere, its configs load, its tree exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from sigma_lite.lab import read_results
from sigma_lite.lab.catalogue import WORTH
from sigma_lite.record import read
from sigma_lite.runfile import load_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_its_numbers_are_those_of_the_recorded_runs():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for name, part in readme.parts().items():
        assert readme.begin(name) + part + readme.end(name) in README, "run benchmarks/readme.py"


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
    assert len(names) > 10
    assert [name for name in names if not (ROOT / "sigma_lite" / name).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "scaled_configs").glob("*.yaml")), ids=lambda p: p.name)
def test_its_configs_load(path):
    load_run([path])
    for overlay in (path.parent / "overlays").glob("*.yaml"):
        load_run([path, overlay])
