"""What an experiment is: which arms are one run, what a share of a run means, and that the catalogue can run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import small
import tiny

from sigma_lite import cli, figures, lab
from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.balance.zipf import k_list
from sigma_lite.config import ConfigError
from sigma_lite.lab.catalogue import BY_LUMPS, DENSE_STEPS, HEAD, TOP1
from sigma_lite.lab.experiment import runs_of, settings_of
from sigma_lite.lab.run import written_yaml
from sigma_lite.runfile import load_run
from sigma_lite.scale.traffic import flops_per_token

ROOT = Path("runs")
CONFIGS = Path(__file__).parents[2] / "scaled_configs"


def runs(name: str, scale: str = "cpu"):
    return runs_of(lab.experiment(name), lab.scale(scale), ROOT)


def test_an_arm_of_two_experiments_is_one_run():
    first, second = ({run.dir for run in runs(name) if run.arm == "LBL, K = 1"} for name in ("fig2", "fig4"))
    assert first == second and len(first) == len(lab.scale("cpu").seeds)


@pytest.mark.parametrize("scale", lab.SCALES)
def test_folders_are_the_same_where_and_only_where_settings_are(scale):
    found = [run for name in lab.EXPERIMENTS for run in runs(name, scale)]

    def weights_depend_on(run) -> str:
        settings = {key: value for key, value in run.settings.items() if key not in ("save", "trainer")}
        trainer = {key: value for key, value in run.settings["trainer"].items() if key != "default_root_dir"}
        return json.dumps([settings, trainer], sort_keys=True)

    for one, other in itertools.combinations(found, 2):
        assert (one.dir == other.dir) == (weights_depend_on(one) == weights_depend_on(other))


def test_a_share_is_a_number_of_steps():
    settings = settings_of(small.CONVERTED, small.scale(steps=40), seed=3)
    assert settings["model"]["sparsity"] == {"head": [2], "switch_step": 20}
    assert settings["seed_everything"] == settings["data"]["rows"]["seed"] == 3
    assert settings_of(small.LOW2, small.scale(steps=40), seed=0)["save"]["milestones"] == [20]


def test_a_run_comes_after_the_one_that_it_begins_from():
    found = runs_of(small.TABLE3, small.scale(), ROOT, seeds=(0, 1))
    at = {(run.arm, run.seed): place for place, run in enumerate(found)}
    for seed in (0, 1):
        parent, child = (found[at[arm, seed]] for arm in ("low 2", "converted"))
        assert child.branch == (parent.dir, 6) and at["low 2", seed] < at["converted", seed]


def test_every_experiment_can_run_at_every_scale(tmp_path):
    for name, scale in itertools.product(lab.EXPERIMENTS, lab.SCALES):
        if scale in ("toy", "long") and name not in ("worth", "length"):
            continue  # the toy has four layers where other lists have six; domains have no packages
        experiment, size = lab.experiment(name), lab.scale(scale)
        for run in runs_of(experiment, size, tmp_path):
            load_run([written_yaml(run)])
            assert run.steps % run.settings["save"]["every"] == 0
            if run.branch:
                parent = next(other for other in runs_of(experiment, size, tmp_path) if other.dir == run.branch[0])
                assert run.branch[1] in parent.settings["save"]["milestones"]
                assert run.settings["model"]["sparsity"]["switch_step"] == run.branch[1]


def test_the_toy_scale_is_the_toy():
    toy = load_run([CONFIGS / "toy.yaml"])
    scale = load_run([], dict(lab.SCALES["toy"].settings))
    assert dataclasses.replace(toy, trainer={}, threads=None) == dataclasses.replace(scale, trainer={})
    given = lab.SCALES["toy"].settings["trainer"]
    assert {key: toy.trainer[key] for key in given} == given


def test_dense_twins_have_the_size_the_work_or_the_time_of_the_mixture(tmp_path):
    runs = {run.arm: run for run in runs_of(lab.experiment("worth"), lab.scale("toy"), tmp_path, seeds=[0])}
    active, work, tokens = {}, {}, {}
    for name, run in runs.items():
        made = load_run([], dict(run.settings))
        active[name], tokens[name] = made.net.ledger().active, run.steps
        schedule = {"switch_step": made.sparsity.switch_step, "head": made.sparsity.head, "target": made.net.top_k}
        steps = [k_per_layer(step, n_layers=made.net.n_layers, **schedule) for step in range(run.steps)]
        work[name] = sum(flops_per_token(made.net, k, made.rows.length).training for k in steps)
    mixture = "mixture"
    assert active["dense, same active size"] == pytest.approx(active[mixture], rel=5e-3)
    assert work["dense, same work"] == pytest.approx(work[mixture], rel=5e-3)
    assert work["mixture, K = 1 throughout"] == pytest.approx(work["dense, same active size"], rel=5e-3)
    assert tokens["dense, same time"] == 1500 and len({tokens[n] for n in tokens if n != "dense, same time"}) == 1


def test_the_dense_twins_steps_are_the_measured_ones():
    """The nearest number of whole checkpoints to what benchmarks/step_times.py has measured."""
    measured = json.loads(next((CONFIGS.parent / "results" / "bench").glob("step_times-*.json")).read_bytes())
    assert abs(measured["dense_steps_in_the_time_of_one_of_the_mixture"] - DENSE_STEPS) <= 50 / 1200


@pytest.mark.parametrize("name", lab.EXPERIMENTS)
def test_every_experiment_asks_for_figures_that_exist(name):
    assert set(lab.EXPERIMENTS[name].figures) <= set(figures.OF_RESULTS)


def test_the_list_by_lumps_is_what_the_recorded_run_gives():
    """As long as the same arm is recorded: another recording may ask for another list, and this says so."""
    runs = json.loads((Path(__file__).parents[2] / "results" / "lab" / "layer0-cpu.json").read_bytes())["runs"]
    layers = next(run for run in runs if run["arm"] == TOP1.name)["measured"]
    lumps_L = [layer["variance"]["own"] * layer["variance"]["std"] ** 2 for layer in layers]
    assert list(k_list(lumps_L, sum(HEAD) + 2)) == BY_LUMPS  # the layers behind HEAD have one expert each


def test_wrong_experiments_are_refused():
    with pytest.raises(ConfigError, match="two arms have the same name"):
        lab.Experiment("x", "?", (small.TOP1, small.TOP1))
    with pytest.raises(ConfigError, match="branches from .*low 2.* no arm of it"):
        lab.Experiment("x", "?", (small.CONVERTED,))


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "args, says",
    [
        (("run", "all", "fg2"), "experiment 'fg2' does not exist; did you mean 'fig2'?"),
        (("run", "fig2", "--again", "--reuse"), "not allowed with argument"),
        (("run", "fg2"), "experiment 'fg2' does not exist; did you mean 'fig2'?"),
        (("show", "fig2", "tabel3"), "experiment 'tabel3' does not exist; did you mean 'table3'?"),
        (("run", "fig2", "--scale", "quik"), "scale 'quik' does not exist; did you mean 'quick'?"),
        (("show", "fig2", "--results", "empty"), "run `sigma-lite lab run fig2 --scale quick` first"),
        (("run", "fig2", "--worker", "2"), "unknown option '--worker'"),
        (("shw",), "invalid choice: 'shw'"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tiny.refused(cli.main, "lab", *args) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_list_names_everything(capsys):
    cli.main(["lab", "list"])
    printed = " ".join(capsys.readouterr().out.split())
    for experiment in lab.EXPERIMENTS.values():
        assert f"{experiment.name}: {experiment.question}" in printed
        assert all(arm.name in printed for arm in experiment.arms)
    for scale in lab.SCALES.values():
        assert scale.description in printed


@pytest.mark.parametrize("seeds", [(), (0, 0), (1, 2, 1)])
def test_seeds_count_once(seeds):
    """No seed at all gave an empty table, one twice a mean in which it weighs double."""
    with pytest.raises(ConfigError, match="give at least one, each once"):
        runs_of(small.TWO, small.scale(), ROOT, seeds=seeds)


@pytest.mark.parametrize("workers", [0, -1])
def test_somebody_has_to_work(workers, tmp_path):
    """0 was taken for the default, and with -1 the lab waited for ever."""
    with pytest.raises(ConfigError, match=f"workers={workers}: at least 1"):
        lab.run_experiment(small.TWO, small.scale(), runs=tmp_path, results=tmp_path, workers=workers)


def test_a_comparison_needs_arms_and_a_name_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match="there is no arm"):
        lab.compare({}, small.scale(), runs=tmp_path, results=tmp_path)
    with pytest.raises(ConfigError, match="name='fig2' is an experiment of the lab"):
        lab.compare({"LBL": {}}, small.scale(), name="fig2", runs=tmp_path, results=tmp_path)
