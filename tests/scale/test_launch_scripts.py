"""launch/slurm.sbatch with stand-ins for srun, scontrol and python: when it stops, is queued again, and gives up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from sigma_lite.config import ConfigError
from sigma_lite.scale.preflight import placed, preflight

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scaled_configs" / "launch"
STOP_SECONDS = 100

STANDINS = {
    # one task, in this shell's group; TERM is passed on to it, as srun does
    "srun": """
echo "srun $*" >> calls
while [[ "$1" == --* ]]; do shift; done
"$@" & task=$!
trap 'kill -TERM "$task"' TERM
code=0; wait "$task" || code=$?
((code <= 128)) || { code=0; wait "$task" || code=$?; }
exit "$code"
""",
    "scontrol": """
echo "scontrol $*" >> calls
[[ "$1" != show ]] || printf "node-0\\nnode-1\\n"
""",
    "squeue": "exit 1\n",
    "python": f"""
[[ "$1" != -c ]] || exec {sys.executable} "$@"
echo "python $*" >> calls
case "$*" in
  *" plan "*) [[ ! -e refused ]] || {{ echo "sigma-lite: no" >&2; exit 2; }}
    echo '{{"checkpoints": {{"stop_seconds": {STOP_SECONDS}}}}}' ;;
  *preflight*) [[ ! -e unlinked ]] || exit 2 ;;
  *" fit "*) [[ ! -e broken ]] || exit 7
    [[ ! -e long ]] || {{ trap 'echo saved >> calls; exit 130' TERM; for n in $(seq 200); do sleep 0.1; done; }} ;;
esac
""",
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(*marks, ends_in=s, **environment) runs a turn of the job and returns it; tmp_path/calls says what was called."""
    monkeypatch.chdir(tmp_path)
    for name, text in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)

    def turn(*marks: str, ends_in: float = 3600, **environment: str) -> subprocess.CompletedProcess:
        for mark in ("refused", "unlinked", "broken", "long", "calls"):
            Path(mark).unlink(missing_ok=True)
        for mark in marks:
            Path(mark).touch()
        slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NODELIST": "node-[0-1]"}
        slurm |= {"SLURM_JOB_END_TIME": str(int(time.time() + ends_in)), "SLURM_CPUS_PER_TASK": "8"}
        slurm |= {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        script = [LAUNCH / "slurm.sbatch", "-c", "some.yaml"]
        return subprocess.run(script, env=slurm | environment, capture_output=True, text=True, timeout=60)

    return turn


def calls(word: str) -> list[str]:
    return [line for line in Path("calls").read_text().splitlines() if word in line]


def test_a_run_that_ends_is_not_queued_again(job):
    done = job()
    assert done.returncode == 0, done.stderr
    plan, preflight, fit = [line.split() for line in calls("python") if line.startswith("python")]
    assert plan[:4] == ["python", "-m", "sigma_lite", "plan"] and preflight == ["python", "-m", "sigma_lite.scale.preflight"]
    asked = "-c some.yaml --trainer.num_nodes=2 --trainer.devices=4"
    assert " ".join(fit) == f"python -m sigma_lite fit {asked}" and asked in " ".join(plan)
    assert calls("requeue") == [] and not list(Path().glob("*.failures"))


def test_failures_are_tried_again_so_many_times(job):
    for turn in range(3):
        done = job("broken")
        assert done.returncode == 0 and calls("requeue") == ["scontrol requeue 77"], (turn, done.stderr)
    done = job("broken")
    assert done.returncode == 7 and calls("requeue") == [] and "failed 4 times" in done.stderr
    assert job("broken", RETRIES="9").returncode == 0, "the number can be chosen"


def test_links_that_do_not_work_are_a_failure_before_training(job):
    done = job("unlinked")
    assert done.returncode == 0 and calls("requeue") and calls(" fit ") == []


def test_what_the_planner_refuses_is_not_tried_again(job):
    done = job("refused")
    assert done.returncode == 2 and "sigma-lite: no" in done.stderr
    assert calls("requeue") == calls(" fit ") == calls("preflight") == []


def test_before_its_time_is_up_a_run_saves_and_is_queued_again(job):
    """As long before the end as the planner says; failures before that are forgotten."""
    Path("sigma-lite-77.failures").write_text("exit code 1\n")
    begun = time.monotonic()
    done = job("long", ends_in=STOP_SECONDS + 2)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 15, "it waited for the run's own end"
    assert [line for line in Path("calls").read_text().splitlines() if line == "saved" or "requeue" in line] == [
        "saved",
        "scontrol requeue 77",
    ]
    assert not Path("sigma-lite-77.failures").exists()


def test_a_turn_too_short_for_a_checkpoint_is_refused(job):
    done = job(ends_in=STOP_SECONDS - 10)
    assert done.returncode == 2 and f"{STOP_SECONDS} s" in done.stderr and "raise --time" in done.stderr
    assert calls(" fit ") == calls("requeue") == []


def test_a_container_holds_every_task(job):
    job(CONTAINER="image.sqsh")
    started = [line for line in calls("srun ") if line.startswith("srun")]
    assert len(started) == 3 and all("--container-image=image.sqsh" in line for line in started)
    job()
    assert not calls("--container")


def test_it_asks_for_whole_nodes_and_leaves_the_signal_to_the_plan():
    lines = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --requeue"} <= set(lines)
    assert not [line for line in lines if "--signal" in line]


# -------------------------------------------------------------------------------------------------------- preflight


def meet(rank: int, ranks: int, port: int, **more: str):
    here = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    return preflight(here | {"MASTER_PORT": str(port)} | more)


@pytest.mark.slow
def test_ranks_that_reach_each_other_say_how_fast():
    """Two processes of their own, as srun starts them; the first says it for all."""
    with tiny.reserved_port() as port:
        here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "sigma_lite.scale.preflight"],
                env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 ranks sum alike" in said[0][0] and "GB/s" in said[0][0]


def test_a_rank_that_does_not_come_ends_the_others_with_a_sentence():
    with tiny.reserved_port() as port, pytest.raises(ConfigError, match="rank 0 of 2 on .* did not reach all others in 1 s"):
        meet(0, 2, port, PREFLIGHT_SECONDS="1")


def test_ranks_are_counted_as_slurm_or_torchrun_say():
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    assert placed(slurm) == (5, 16, 1)
    assert placed(slurm | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == (2, 4, 0), "torchrun inside a job"
    with pytest.raises(ConfigError, match="srun or torchrun"):
        placed({})
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        preflight(slurm)


def test_prepare_goes_back_into_the_queue_so_many_times(job, tmp_path):
    """A python that fails, as after a lost connection."""
    Path("bin/python").write_text("#!/usr/bin/env bash\nexit 5\n")
    for turn, (code, requeued) in {"0": (0, True), "2": (0, True), "3": (5, False)}.items():
        Path("calls").unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": "78", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": turn}
        slurm |= {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run([LAUNCH / "prepare.sbatch", "-c", "x.yaml"], env=slurm, capture_output=True, text=True)
        assert (done.returncode, bool(calls("requeue"))) == (code, requeued), (turn, done.stderr)
