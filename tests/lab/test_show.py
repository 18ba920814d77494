"""The lab's page: true to its results, self-contained, safe; and the commands that make it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import small
import synthetic_results
from read_page import Page

from sigma_lite import cli, figures
from sigma_lite.figures import final_rows
from sigma_lite.lab import catalogue, scales, show
from sigma_lite.lab.results import active_parameters, how_to_repeat, read_results
from sigma_lite.lab.show import write_page

RECORDED = Path(__file__).parents[2] / "results/lab/family-cpu.json"
ATTACK = "</script></pre><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)><!-- <i>"
RESULTS = synthetic_results.results(seeds=(0, 1))


def written(folder: Path, results: dict, name: str = "made-up") -> Path:
    path = folder / f"{name}-quick.json"
    path.write_text(json.dumps(results | {"experiment": name}))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("results")
    out = write_page([written(folder, RESULTS)])
    assert out == folder / "made-up-quick.html"
    return Page(out.read_text("utf-8"))


def test_the_page_holds_question_arms_numbers_and_provenance(page):
    for text in (RESULTS["question"], RESULTS["command"], "torch 2.13.0", "0123abc", "AMD EPYC", "a first look"):
        assert text in page.words
    for name, facts in RESULTS["arms"].items():
        assert name in page.words and facts["says"] in page.words
    assert all(cell in page.words for row in final_rows(RESULTS)[1] for cell in row)
    assert "n_experts: 96" in page.words


def test_it_draws_what_the_experiment_asks_for_and_what_always_helps(page):
    drawn = [attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes]
    wanted = ["layer0-deviation", "load-and-probability", "deviation-by-layer", "learning-curves"]
    assert drawn == [f"made-up-{name}" for name in wanted]
    runs = [run for run in RESULTS["runs"] if run["arm"] == "K = 8 low"]
    mean = [sum(100 * run["heldout"]["max"][layer] for run in runs) / 2 for layer in range(4)]
    trace = page.data("data-made-up-deviation-by-layer")["data"][2]
    drawn = np.frombuffer(base64.b64decode(trace["y"]["bdata"]), "<" + trace["y"]["dtype"])
    np.testing.assert_allclose(drawn, mean, rtol=1e-6)


def test_active_parameters_of_own_parts_are_counted_or_left_out():
    """Older runs recorded what the shape says: 167,104 for all of these. One shared expert more: 6 x 9,216."""
    runs = {run["arm"]: run for run in read_results(RECORDED)["runs"]}
    plain, one = 167_104, 3 * 64 * 48
    latent = plain + 6 * (one // 2 + 2 * 64 * 32 + 32 - one)
    hashed = plain - 6 * 64 * 96  # a hash needs no router
    expected = {"LBL, K = 1": plain, "hash routing": hashed, "shared expert": plain + 6 * one, "LatentMoE": latent}
    assert {arm: active_parameters(runs[arm]) for arm in expected} == {arm: [n, n] for arm, n in expected.items()}
    config = {**runs["LatentMoE"]["config"], "parts.experts": {"class": "mine.Experts", "settings": {}, "code": ""}}
    assert active_parameters(runs["LatentMoE"] | {"config": config}) is None, "a record names no code that is run"
    counted = {"config": config, "active_params": [5, 5]}
    assert active_parameters(runs["LatentMoE"] | counted) == [5, 5], "a newer run has counted them"


def test_nothing_is_loaded_from_anywhere(page):
    loaders = {"link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form"}
    assert not [tag for tag, _ in page.tags if tag in loaders]
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(address.startswith("#") for address in addresses)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    scripts = [text for attributes, text in page.scripts if "type" not in attributes]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    assert len(scripts) == 2 and policy.startswith(f"default-src 'none'; script-src {hashes}")


def test_a_file_of_several_calls_is_repeated_by_none_of_them():
    one = "sigma-lite lab run made-up --scale quick --seeds 0 1"
    several = copy.deepcopy(RESULTS) | {"command": one}
    assert how_to_repeat(several) == one, "older runs do not say of which call they are"
    for run in several["runs"]:
        run["command"] = one
    assert how_to_repeat(several) == one
    several["runs"][0]["command"] = several["command"] = f"{one} --arms 'LBL, K = 1'"
    plain = "sigma-lite lab run made-up --scale quick\n(this file is of several calls"
    assert how_to_repeat(several).startswith(plain)
    assert how_to_repeat(RESULTS | {"command": several["command"]}).startswith(plain)
    ranked = several | {"command": "sigma-lite lab rank mine.py:Idea --scale quick"}
    assert how_to_repeat(ranked) == ranked["command"]
    assert how_to_repeat(RESULTS | {"command": ""}) == "unknown"


def test_text_of_results_stays_text(tmp_path, page):
    results = copy.deepcopy(RESULTS)
    for key in ("question", "command", "scale_says"):
        results[key] = ATTACK
    results["arms"] = {ATTACK: {"says": ATTACK, "branch": None}}
    results["runs"] = results["runs"][:1]
    results["runs"][0] |= {"arm": ATTACK, "commit": ATTACK, "device": ATTACK, "versions": {ATTACK: ATTACK}, "time": ATTACK}
    results["runs"][0]["config"] = {ATTACK: ATTACK}
    attacked = Page(write_page([written(tmp_path, results)]).read_text("utf-8"))
    assert len(attacked.scripts) == len(page.scripts) and not {"img", "i"} & {tag for tag, _ in attacked.tags}
    assert attacked.words.count(ATTACK) >= 8


def test_the_same_results_give_the_same_bytes_and_several_share_one_page(tmp_path):
    one, two = written(tmp_path, RESULTS, "one"), written(tmp_path, RESULTS, "two")
    first = write_page([one, two])
    assert first.name == "lab-quick.html" and first.read_bytes() == write_page([one, two], tmp_path / "x.html").read_bytes()
    page = Page(first.read_text("utf-8"))
    drawn = [attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes]
    assert len(drawn) == len(set(drawn)) == 8 and first.stat().st_size < 6e6  # plotly.js is there once


def test_figures_have_a_place_on_the_page_without_data_too(tmp_path):
    results = {**RESULTS, "figures": ["bias_spread"], "runs": [r for r in RESULTS["runs"] if r["arm"] == "LBL, K = 1"]}
    page = Page(write_page([written(tmp_path, results)]).read_text("utf-8"))
    assert "no arm of this experiment has moved a bias" in page.words


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_commands_run_draw_and_print(place, forks, monkeypatch, capsys):
    """`lab run` twice and `lab show`, on a small experiment instead of the catalogue's."""
    monkeypatch.setitem(catalogue.EXPERIMENTS, "two", small.TWO)
    monkeypatch.setitem(scales.SCALES, "tiny", small.scale(6))
    options = ("two", "--scale", "tiny", "--runs", "runs", "--results", "results", "--workers", "2", "--seeds", "0", "1")
    cli.main(["lab", "run", *options])
    printed = capsys.readouterr().out
    assert "Do two arms run side by side?" in printed and "page          results/two-tiny.html" in printed
    results = json.loads(Path("results/two-tiny.json").read_text("utf-8"))
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (a, s) for a in ("top-1", "from scratch") for s in (0, 1)
    ]
    assert results["command"] == "sigma-lite lab run two --scale tiny --seeds 0 1"
    assert all(cell in printed for row in final_rows(results)[1] for cell in row) and "\u00a0to\u00a0" in printed
    assert {run["command"] for run in results["runs"]} == {results["command"]}
    before = Path("results/two-tiny.html").read_bytes()
    cli.main(["lab", "run", *options])
    cli.main(["lab", "show", "two", "--scale", "tiny", "--results", "results", "--out", "again.html"])
    assert Path("again.html").read_bytes() == Path("results/two-tiny.html").read_bytes() == before


def test_svg_files_are_named_after_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "static_svg", lambda fig, path: path)
    names = [path.name for path in show.write_svgs(written(tmp_path, RESULTS), tmp_path / "svg")]
    assert names == [f"made-up-quick-{figure}.svg" for figure in RESULTS["figures"]]
    assert set(RESULTS["figures"]) <= set(figures.OF_RESULTS)
