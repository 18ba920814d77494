"""benchmarks/post.py at tiny scale: arms, what is kept, and what is done again."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def post():
    spec = importlib.util.spec_from_file_location("post", ROOT / "benchmarks" / "post.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(post, finished, tmp_path_factory) -> Path:
    """A folder with arms.json, two seeds of four arms of a tiny model. Do not write into it."""
    folder = tmp_path_factory.mktemp("arms")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    replay = {"source": "files", "path": "text", "heldout": 0.2, "dir": "data/replay"}
    over = {
        "model": {"net": tiny.SETTINGS["model"]["net"]},
        "data": {"mixture": {"sources": {"problems": {"max_documents": 200}, "replay": replay}}, "rows": {"length": 64}},
    }
    (folder / "over.yaml").write_text(yaml.safe_dump(over))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        post.main(arguments("--seeds", "2", "--arms", "worked", "frozen routers", "rewarded", "null rewards"))
    return folder


def arguments(*more: str) -> list[str]:
    return ["run", "--steps", "2", "--problems", "3", "--over", "over.yaml", "--out", "arms.json", *more]


@pytest.fixture
def here(recorded, tmp_path, monkeypatch) -> Path:
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_arm_and_seed_is_measured(recorded):
    facts = json.loads((recorded / "arms.json").read_text())
    assert set(facts["arms"]) == {"worked", "frozen routers", "begun", "rewarded", "null rewards"}, "with their start"
    for name, seeds in facts["arms"].items():
        assert set(seeds) == {"0", "1"}
        for entry in seeds.values():
            assert set(entry["tasks"]) == {"add2"} and 0 <= entry["tasks"]["add2"]["exact_match"] <= 1
            assert entry["steps"] == 2 and entry["bits_per_byte"] > 0 and len(entry["drift"]["changed_text"]) == 2
            assert ("rewards" in entry) == (name in ("rewarded", "null rewards"))
    drifts = facts["arms"]["frozen routers"]["0"]["drift"]
    assert drifts["changed_problems"] == drifts["changed_old_routers_problems"], "its routers are those of before"
    assert max(drifts["changed_problems"]) > 0, "which freezes no choice"
    free = facts["arms"]["worked"]["0"]["drift"]
    assert free["changed_problems"] != free["changed_old_routers_problems"]
    assert facts["before"]["bits_per_byte"] > 0 and facts["same"]["steps"] == 2


def test_what_is_kept_is_not_done_again(here, post, monkeypatch):
    """A lost arm is trained anew and gives the same; a new seed is added; nothing else is touched."""
    facts = json.loads(Path("arms.json").read_text())
    done = []
    arm = post.arm
    monkeypatch.setattr(post, "arm", lambda options, name, seed: done.append((name, seed)) or arm(options, name, seed))
    lost = facts["arms"]["worked"].pop("1")
    Path("arms.json").write_text(json.dumps(facts))
    shutil.rmtree("runs/post/worked-1")
    post.main(arguments("--seeds", "2", "--arms", "worked", "rewarded"))
    assert done == [("worked", 1)]
    again = json.loads(Path("arms.json").read_text())["arms"]["worked"]["1"]
    for name in lost.keys() - {"training_seconds", "seconds"}:
        assert again[name] == lost[name], name


def test_results_of_other_settings_are_not_mixed(here, post):
    for other in (["--steps", "3"], ["--problems", "4"]):
        with pytest.raises(SystemExit, match="choose another --out"):
            post.main([*arguments(), *other])


def test_arms_differ_in_what_they_say(post):
    options = post.parsed(["run", "--runs", "here"])
    each = {name: post.settings(options, name, 0) for name in post.ARMS}
    assert each["random start"]["init_from"] is None and each["worked"]["init_from"] == "run"
    assert {each[name]["init_from"] for name in post.REWARDED} == {"here/begun-0"}
    assert each["frozen routers"]["model"]["optim"]["router_lr"] == 0
    assert each["replay"]["data"]["mixture"]["weights"] == {"problems": 0.9, "replay": 0.1}
    assert (each["family"]["trainer"]["max_steps"], each["worked"]["trainer"]["max_steps"]) == (420, 250)
    assert each["null rewards"]["model"]["reward"] == {"null": True, "seed": 0}
    folders = {name: own["data"]["corpus"]["dir"] for name, own in each.items()}
    assert folders["worked"] == folders["rewarded"] != folders["direct"]
    assert all(own["trainer"]["max_steps"] % own["save"]["every"] == 0 for own in each.values())
