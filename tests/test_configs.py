"""scaled_configs/: every rung loads, plans, fits the machine it names, and says so in its first lines; scripts start it."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sigma_lite.config import ModelConfig
from sigma_lite.runfile import load_run
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.layout import STRATEGY
from sigma_lite.scale.table import duration, size_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scaled_configs"
LADDER = ("toy", "reference", "laptop", "gpu_24gb", "gpu_80gb", "node_8gpu", "sigma_moe_tiny")  # from small to large
OVERLAYS = sorted(path.stem for path in (CONFIGS / "overlays").glob("*.yaml"))
SCRIPTS = sorted((CONFIGS / "launch").iterdir())


def rung(name: str, *overlays: str):
    return load_run([CONFIGS / f"{name}.yaml", *(CONFIGS / "overlays" / f"{overlay}.yaml" for overlay in overlays)])


def header(name: str) -> dict[str, str]:
    """{"Question": ..., "Memory": ...}: the comments before the first key, a line that names no topic joined to the last."""
    comments = itertools.takewhile(
        lambda line: line.startswith("#"), (CONFIGS / f"{name}.yaml").read_text("utf-8").splitlines()
    )
    topics: dict[str, str] = {}
    for line in comments:
        topic, colon, text = line[2:].partition(": ")
        if colon and re.fullmatch("[A-Z][a-z]+", topic):
            topics[topic] = text
        elif topics:
            topics[list(topics)[-1]] += " " + line[2:]
    return topics


def planned(name: str) -> dict:
    return forecast(rung(name), re.search(r"--cluster ([\w-]+)", header(name)["Hardware"])[1])


def test_the_ladder_is_complete_and_climbs():
    assert sorted(LADDER) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    sizes = [rung(name).net.ledger().total for name in LADDER]
    assert sizes == sorted(sizes) and sizes[-1] > 1000 * sizes[0]


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_fits_the_machine_it_names_as_it_is_laid_out(name):
    facts = planned(name)
    assert facts["fits"] and facts["layout"]["problem"] == ""
    assert facts["layout"]["devices"] == facts["cluster"]["nodes"] * facts["cluster"]["devices_per_node"]


@pytest.mark.parametrize("name", LADDER)
def test_its_first_lines_say_what_the_planner_says(name):
    topics, facts = header(name), planned(name)
    assert list(topics)[:6] == ["Question", "Hardware", "Memory", "Time", "Data", "Schedule"]
    assert "?" in topics["Question"]
    assert topics["Memory"].startswith(f"{size_of(facts['initial']['peak_bytes'])} a device, planned")
    assert topics["Time"].startswith(f"{duration(facts['run']['hours'])}, predicted")
    assert re.search(r"(never measured|were recorded\b.*)$", topics["Time"])
    run = rung(name)
    for number in (run.sparsity.switch_step, run.trainer["max_steps"], run.optim.warmup_steps):
        assert f"{number:,}" in topics["Schedule"]


@pytest.mark.parametrize("name", LADDER)
def test_a_run_ends_where_it_saves_and_decays_after_its_switch(name):
    run = rung(name)
    every = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))["save"]["every"]
    assert run.trainer["max_steps"] % every == 0
    assert run.optim.warmup_steps < run.sparsity.switch_step < run.trainer["max_steps"]
    assert max(run.sparsity.head) == 8 and run.net.top_k == 1 and run.net.n_experts == 96


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", LADDER)
def test_every_overlay_lies_over_every_rung(name, overlay):
    run = rung(name, overlay)
    strategy = run.trainer.get("strategy")
    assert strategy is None or strategy["class_path"] == STRATEGY


def test_the_strategy_takes_the_arguments_that_the_files_give():
    """Read from its source: importing it would import Lightning, which takes seconds."""
    tree = ast.parse((ROOT / "sigma_lite" / "scale" / "strategy.py").read_text("utf-8"))
    strategy = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == STRATEGY.rpartition(".")[2])
    made = next(n for n in strategy.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    known = {argument.arg for argument in made.args.args} - {"self"}
    given = [rung(name, *overlay).trainer.get("strategy") for name in LADDER for overlay in [(), *((o,) for o in OVERLAYS)]]
    arguments = set().union(*(strategy["init_args"] for strategy in given if strategy))
    assert arguments and arguments <= known


def test_the_full_rung_is_the_published_shape():
    run = rung("sigma_moe_tiny")
    assert run.net == ModelConfig.preset("sigma_moe_tiny")
    facts = planned("sigma_moe_tiny")
    assert round(facts["active_params_target"] / 1e9, 3) == 0.537
    assert round(facts["active_params_initial"] / 1e9, 3) == 0.650
    assert round(facts["non_embedding_params"] / 1e9, 2) == 19.36


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("overlays", [(), ("eighth",), ("eighth", "narrow")])
def test_its_model_is_built_without_memory_and_has_the_counted_parameters(name, overlays):
    """The ledger against torch's own count, part by part, on the meta device: also of an eighth of the full depth."""
    import torch

    from sigma_lite.model import Transformer

    net = rung(name, *overlays).net
    with torch.device("meta"):
        model = Transformer(net)
    counts = {part: 0 for part in ("embedding", "attention", "router", "norms", "experts")}
    for path, parameter in model.named_parameters():
        parts = {"norm": "norms", "router": "router", "experts": "experts", "attention.": "attention"}
        counts[next((part for key, part in parts.items() if key in path), "embedding")] += parameter.numel()
    ledger = net.ledger()
    assert counts == {part: getattr(ledger, part) for part in counts}


# --------------------------------------------------------------------------------------------------------- launching


def test_scripts_name_files_that_exist():
    assert [path.name for path in SCRIPTS] == ["prepare.sbatch", "slurm.sbatch", "torchrun.sh"]
    for script in SCRIPTS:
        named = re.findall(r"scaled_configs/[\w./-]+\.(?:yaml|sh|sbatch)", script.read_text("utf-8"))
        assert named, f"{script} shows no example"
        assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash_that_parses_and_stops_at_the_first_error(script):
    text = script.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", script], check=True)
    unquoted = re.findall(r'(?<!["\w{(=])\$\w+(?!["\w])', re.sub(r'"[^"]*"|#.*', "", text))
    assert unquoted == [], "quote what a shell would split"


def test_torchrun_script_starts_what_it_says(tmp_path):
    """With a torchrun that only prints its arguments."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    config = str(CONFIGS / "node_8gpu.yaml")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "2", "DEVICES": "4", "HEAD": "head:1234"}
    script = CONFIGS / "launch" / "torchrun.sh"
    done = subprocess.run([script, "-c", config, "--trainer.max_steps=3"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, arguments = (line.split() for line in done.stdout.splitlines())
    for started in (first, arguments):
        assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=head:1234"} <= set(started)
    assert first[-2:] == ["-m", "sigma_lite.scale.preflight"] and "--max-restarts=0" in first
    assert arguments[arguments.index("sigma_lite") - 1] == "-m"
    assert arguments[arguments.index("sigma_lite") + 1 :] == [
        "fit",
        "-c",
        config,
        "--trainer.max_steps=3",
        "--trainer.num_nodes=2",
        "--trainer.devices=4",
    ]
    refused = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr


@pytest.mark.slow
def test_prepare_script_shares_out_the_parts(tmp_path):
    """With an srun that starts the tasks on this machine; what they prepare is what one process does."""
    import tiny

    from sigma_lite.data.shards import load

    tiny.write_corpus(tmp_path)
    tiny.write_config(tmp_path, data__corpus__parts=3)
    fake = tmp_path / "srun"
    fake.write_text(
        "#!/usr/bin/env bash\nset -eu\n"
        'while [[ "$1" == --* ]]; do [[ "$1" == --ntasks=* ]] && SLURM_NTASKS="${1#*=}"; shift; done\n'
        'for ((n = 0; n < SLURM_NTASKS; n++)); do SLURM_PROCID="$n" "$@" & tasks[n]=$!; done\n'
        'for task in "${tasks[@]}"; do wait "$task"; done\n'
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_NTASKS": "3"}
    script = [CONFIGS / "launch" / "prepare.sbatch", "-c", "tiny.yaml"]
    for tasks in ("3", "2"):
        folder = f"--data.corpus.dir=by-{tasks}"
        environment["SLURM_NTASKS"] = tasks
        done = subprocess.run([*script, folder], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith("data ")][-1]
        assert f"by-{tasks}: " in said and "training and" in said
    by_two, by_three = (load(tmp_path / f"by-{tasks}", full_check=True).manifest for tasks in ("2", "3"))
    assert by_two["fingerprint"] == by_three["fingerprint"]
    refused = subprocess.run(script[:1], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr
