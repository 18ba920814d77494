"""The README says what is: its numbers come from results/, its links lead somewhere, its configs load, its tree exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from sigma_lite.record import read
from sigma_lite.runfile import load_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_its_numbers_are_those_of_the_recorded_runs():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    toy, dense = (read(ROOT / "results" / f"{name}.jsonl") for name in ("toy", "toy_dense"))
    for name, part in readme.parts(toy, dense).items():
        assert readme.begin(name) + part + readme.end(name) in README, "run benchmarks/readme.py"


def test_the_recorded_comparison_is_a_fair_one():
    toy, dense = (read(ROOT / "results" / f"{name}.jsonl") for name in ("toy", "toy_dense"))
    ours, theirs = (entries[0] for entries in (toy, dense))
    assert theirs["ledger"]["active_target"] >= ours["ledger"]["active_target"]
    for part in ("corpus", "rows", "optim", "trainer", "seed_everything"):
        assert ours["config"][part] == theirs["config"][part]
    assert {e["data"]["xz_bits_per_byte"] for e in (ours, theirs)} == {ours["data"]["xz_bits_per_byte"]}
    scores = [[e for e in entries if e["kind"] == "validation"][-1] for entries in (toy, dense)]
    assert scores[0]["step"] == scores[1]["step"]
    assert scores[0]["bits_per_byte"] < scores[1]["bits_per_byte"] < ours["data"]["xz_bits_per_byte"]


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
