"""What a run says of itself: one table of names, told to any logger and the diary; it changes nothing and costs little."""

from __future__ import annotations

import json
import mmap
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from sigma_lite import cli, record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Routing, Transformer
from sigma_lite.runfile import from_mapping, load_run
from sigma_lite.train import loggers
from sigma_lite.train.callbacks import names, throughput
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.load_recorder import largest_logits
from sigma_lite.train.callbacks.telemetry import Telemetry, expert_gradient_norms, rows_of_ranks
from sigma_lite.train.memory import Peak

ROOT = Path(__file__).parents[2]
LOGGER = '''
import json, os
from lightning.pytorch.loggers import Logger

class Lines(Logger):
    """Of a stranger: knows nothing of this package, guards no rank, writes what it is told."""

    name, version = "lines", 0

    def __init__(self, file: str):
        super().__init__()
        self.file = file

    def write(self, what):
        with open(self.file, "a") as out:
            out.write(json.dumps([os.environ.get("LOCAL_RANK", "0"), *what]) + "\\n")

    def log_hyperparams(self, params):
        self.write([0, {"settings": sorted(params)}])

    def log_metrics(self, metrics, step=None):
        self.write([step, metrics])
'''
OFTEN = {"trainer__log_every_n_steps": 6, "telemetry__every": 4, "telemetry__cluster": "cpu-core"}
# Names of a mixture's runs, of a stage of rewards, and of attention that chooses heads.
OTHERS = ("val/{source}", "reward/", "moe/layer_{layer}/queries")


def table() -> set[str]:
    """The names that names.py documents: "moe/layer_{layer}/lbl"."""
    return set(re.findall(r"^    (\w+/\S+)", names.__doc__, re.M))


def pattern(name: str) -> str:
    """The line of the table that a name belongs to."""
    name = re.sub(r"layer_\d\d/", "layer_{layer}/", re.sub(r"rank_\d\d/", "rank_{rank}/", name))
    name = re.sub("^(data|val)/[^/]+/", r"\1/{source}/", name)
    return re.sub("^train/(lm|balance|z)$", "train/{term}", name)


def told(file: str = "lines.jsonl") -> list[tuple[str, int, dict]]:
    """[(rank, step, metrics)] in order, settings left out."""
    lines = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    return [(rank, step, metrics) for rank, step, metrics in lines if "settings" not in metrics]


def watched(place: Path, **changes: object) -> None:
    (place / "strangers.py").write_text(LOGGER)
    logger = {"class_path": "strangers.Lines", "init_args": {"file": "lines.jsonl"}}
    tiny.write_config(place, "watched.yaml", trainer__logger=logger, **{**OFTEN, **changes})


def values(metrics: list[tuple[str, int, dict]]) -> dict[tuple[int, str], float]:
    """{(step, name): value} of everything that no clock decides."""
    return {(step, n): v for _, step, found in metrics for n, v in found.items() if not n.startswith("perf/")}


# ------------------------------------------------------------------------------------------------------------- names


def test_a_strangers_logger_gets_the_names_of_the_table_and_the_run_stays_the_same_bitwise(place, finished, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    watched(place)
    cli.main(["fit", "-c", "watched.yaml"])
    elsewhere = {name for name in table() if "rank" in name or name.startswith(OTHERS)}
    assert {pattern(name) for *_, found in told() for name in found} == table() - elsewhere and len(elsewhere) == 6
    first = json.loads(Path("lines.jsonl").read_text("utf-8").splitlines()[0])
    assert {"net", "optim", "trainer"} <= set(first[2]["settings"])
    weights, plain = (read_checkpoint(newest_checkpoint(run))["state_dict"] for run in ("run", finished / "run"))
    assert weights.keys() == plain.keys() and all(torch.equal(weights[name], plain[name]) for name in weights)


def test_loggers_are_told_what_the_diary_says(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    watched(place, trainer__val_check_interval=5)
    cli.main(["fit", "-c", "watched.yaml"])
    found, diary = values(told()), Path("run/record.jsonl")
    steps = {entry["step"]: entry for entry in record.read(diary, "step")}
    assert sorted({step for step, name in found if name == "train/loss"}) == [6, 12]
    for step in (6, 12):
        entry = steps[step]
        for name in ("loss", "lbl", "lr", "grad_norm", "tokens"):
            assert found[step, f"train/{name}"] == entry[name]
        assert [found[step, f"moe/layer_0{layer}/k"] for layer in (0, 1)] == entry["k"]
        assert 0 < entry["perf"]["mfu"] < 1
        assert entry["perf"].get("peak_memory", 1) > 0, "left out where the process has not grown"
    for entry in record.read(diary, "load"):
        for layer, f_E in enumerate(entry["f"]):
            assert found[entry["step"], f"moe/layer_0{layer}/max_deviation"] == pytest.approx(8 * max(f_E) - 1)
            assert found[entry["step"], f"moe/layer_0{layer}/logit_max"] == entry["logit_max"][layer] > 0
    held = {entry["step"]: entry["bits_per_byte"] for entry in record.read(diary, "validation")}
    assert held == {step: value for (step, name), value in found.items() if name == "val/bits_per_byte"}
    assert sorted(held) == [5, 10, 12], "the last is measured when training has ended"
    assert [entry["step"] for entry in record.read(diary, "experts")] == [4, 8, 12]


def test_of_a_mixture_each_source_is_told():
    scores = {"bits_per_byte": 2.0, "nats_per_token": 3.0}
    found = names.of_validation({**scores, "sources": {"code": scores, "prose": {**scores, "bits_per_byte": 4.0}}})
    assert found["val/prose/bits_per_byte"] == 4.0 and found["val/bits_per_byte"] == 2.0
    assert {pattern(name) for name in found} == {name for name in table() if name.startswith("val/")}


def test_a_resumed_run_goes_on_with_the_steps_of_its_logger(place, monkeypatch):
    """Cut off in step 8, after the checkpoint of step 6: what is told twice is the same, and nothing is missing."""
    monkeypatch.syspath_prepend(str(place))
    watched(place, trainer__log_every_n_steps=1)
    cli.main(["fit", "-c", "watched.yaml"])
    whole = values(told())
    end = Diary.on_train_batch_end

    def cut_off(self, trainer, *args):
        if trainer.global_step == 8:
            raise RuntimeError("power cut")
        end(self, trainer, *args)

    watched(place, trainer__log_every_n_steps=1, trainer__default_root_dir="other")
    Path("lines.jsonl").unlink()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Diary, "on_train_batch_end", cut_off)
        cli.main(["fit", "-c", "watched.yaml"])
    before = told()
    cli.main(["fit", "-c", "watched.yaml"])
    after = told()[len(before) :]
    assert min(step for _, step, _ in after) == 7 <= max(step for _, step, _ in before)
    twice = values(before).keys() & values(after).keys()
    assert twice and all(values(before)[key] == values(after)[key] for key in twice)
    assert values(before) | values(after) == whole


def test_without_a_diary_lightning_tells_loggers_as_before(place):
    """A trainer of one's own around SigmaLit: the names of its `log` calls."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from sigma_lite.data.datamodule import TokenDataModule
    from sigma_lite.train.module import SigmaLit

    run = load_run(["tiny.yaml"])
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    csv = CSVLogger("mine", name="", version="")
    quiet |= {"accumulate_grad_batches": 2, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=csv, log_every_n_steps=1, **quiet)
    trainer.fit(SigmaLit(run.net), datamodule=TokenDataModule(run.corpus, run.rows))
    assert {"lm", "lbl"} <= set(Path("mine/metrics.csv").read_text("utf-8").splitlines()[0].split(","))


# ---------------------------------------------------------------------------------------------------- single measures


def net(**changes) -> ModelConfig:
    return from_mapping(ModelConfig, {**tiny.SETTINGS["model"]["net"], **changes}, "net")


def test_norms_of_experts_are_those_of_their_slices_and_add_up():
    model, ids = Transformer(net()), torch.randint(300, (2, 16))
    assert expert_gradient_norms(model) is None, "no gradient yet, as in a step that was refused"
    model.loss(ids, ids)[0].backward()
    norms_LE = expert_gradient_norms(model)
    for layer, block in enumerate(model.blocks):
        grads = [p.grad for p in block.moe.experts.parameters()]
        for e in range(8):
            alone = torch.cat([grad[e].flatten() for grad in grads]).norm()
            assert norms_LE[layer, e] == pytest.approx(alone.item(), rel=1e-5)
    whole = torch.nn.utils.get_total_norm([p.grad for b in model.blocks for p in b.moe.experts.parameters()])
    assert norms_LE.square().sum().sqrt().item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_largest_logit_is_absolute():
    made = [Routing(None, None, None, torch.tensor([[1.0, -3.0], [2.0, 0.5]])), Routing(None, None, None, torch.ones(2, 4))]
    assert largest_logits(made).tolist() == [3.0, 1.0]


def test_an_expert_that_a_layer_does_not_have_has_no_logit():
    logits = torch.tensor([[1.0, -3.0, -torch.inf], [2.0, 0.5, -torch.inf]])
    assert largest_logits([Routing(None, None, None, logits)]).tolist() == [3.0]
    assert largest_logits([Routing(None, None, None, logits.nan_to_num(neginf=torch.nan))])[0].isnan(), "a lost run is seen"


def test_rows_of_ranks_are_those_of_their_experts():
    counts_LE = torch.tensor([[4, 0, 1, 3], [2, 2, 2, 2]])
    assert rows_of_ranks(counts_LE, 2, None) == {"rows": [8, 8], "fullest_rank": 1.0}
    uneven = torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]])
    assert rows_of_ranks(uneven, 2, None) == {"rows": [12, 4], "fullest_rank": 1.5}
    import numpy as np

    copied_LP = np.array([[0, 1, 0, 2, 3, 0], [0, 1, 2, 3, 0, 1]])  # three of six spots hold expert 0 of the first layer
    found = rows_of_ranks(uneven, 2, copied_LP)
    assert sum(found["rows"]) == 16 and found["rows"] == [round(16 / 3 + 4), round(8 / 3 + 4)]


def test_every_moment_is_of_one_kind(monkeypatch):
    """Law: seconds of steps and of all that they wait for add up to the time that has passed."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock, trainer = throughput.Throughput(), SimpleNamespace(accumulate_grad_batches=1, world_size=2)
    trainer.callbacks = [clock]
    module = SimpleNamespace(net=net(), model=SimpleNamespace(k_per_layer=(1, 1)), parts=SimpleNamespace(custom={}))
    batch, clock.peak_flops = SimpleNamespace(ids_BS=torch.zeros(2, 5)), 1e6
    outputs = {"tokens": 10}
    clock.on_train_start(trainer, module)
    for n in range(3):
        now[0] += 0.5  # data
        clock.on_train_batch_start(trainer, module, batch, n)
        now[0] += 2.0
        clock.on_train_batch_end(trainer, module, outputs, batch, n)
        now[0] += 0.25
        throughput.lap(trainer, "recording")
        now[0] += 1.0
        throughput.lap(trainer, "saving")
        clock.on_validation_start(trainer, module)
        now[0] += 3.0
        clock.on_validation_end(trainer, module)
    assert clock.seconds == 6.0 and clock.seconds + sum(clock.waited.values()) == now[0] == 20.25
    found = clock.since_last(trainer, module)
    assert found["tokens_per_second"] == 60 / 6 and found["tokens_per_second_overall"] == 60 / 20.25
    assert [found[f"{kind}_seconds"] for kind in throughput.WAITING] == [0.5, 1.0, 3.0, 0.25]
    flops = throughput.flops_per_token(net(), (1, 1), 5).training
    assert found["mfu"] == pytest.approx(flops * 60 / (6.0 * 2 * 1e6)) == pytest.approx(clock.mfu)
    again = throughput.Throughput()
    again.load_state_dict(clock.state_dict())
    assert (again.tokens, again.seconds, again.waited) == (60, 6.0, clock.waited)
    again.load_state_dict({"tokens": 7, "seconds": 1.5})  # of a checkpoint before waiting was counted
    assert (again.tokens, again.seconds) == (7, 1.5)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says it")
def test_the_peak_of_a_cpu_is_what_training_held_at_one_time():
    peak = Peak()
    peak.begin(torch.device("cpu"))
    before = peak.bytes()
    with mmap.mmap(-1, 40 * 2**20) as block:  # past malloc, which may hold freed memory of the tests before
        block.write(b"x" * len(block))
    assert 35 * 2**20 < peak.bytes() - before < 80 * 2**20, "it was given back, and counts all the same"


# --------------------------------------------------------------------------------------------------------- in yaml


def test_a_logger_whose_package_is_missing_is_answered_with_the_command_that_installs_it(place, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for name, install in (("TensorBoardLogger", "pip install 'sigma-lite[watch]'"), ("WandbLogger", "pip install wandb")):
        assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", f"--trainer.logger={name}") == 2
        said = capsys.readouterr().err.strip()
        assert install in said and "--trainer.logger=false" in said and "\n" not in said
    assert not Path("run").exists()


def test_only_loggers_of_lightning_need_their_packages(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for given in (None, False, True, {"class_path": "mine.WandbLogger"}, "CSVLogger", [{"class_path": "mine.X"}]):
        loggers.require_packages(given)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        loggers.require_packages([{"class_path": "lightning.pytorch.loggers.WandbLogger"}])
    monkeypatch.setattr(loggers, "find_spec", lambda name: name if name == "tensorboardX" else None)
    loggers.require_packages("TensorBoardLogger")


def test_a_logger_by_its_short_name_writes_into_the_runs_folder(place):
    cli.main(["fit", "-c", "tiny.yaml", "--trainer.max_steps=2", "--trainer.logger=CSVLogger", "--trainer.logger.name=csv"])
    head = Path("run/csv/version_0/metrics.csv").read_text("utf-8").splitlines()[0]
    assert "train/loss" in head and "perf/tokens_per_second" in head
    assert "d_model: 32" in Path("run/csv/version_0/hparams.yaml").read_text("utf-8")


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard: the extra [watch]")
def test_tensorboard_holds_what_a_shipped_config_logs(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = load_run([ROOT / "scaled_configs/gpu_24gb.yaml"]).trainer["logger"]
    tiny.write_config(place, trainer__logger=logger, **OFTEN)
    cli.main(["fit", "-c", "tiny.yaml"])
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    assert {pattern(name) for name in events.Tags()["scalars"]} == {
        name for name in table() if "rank" not in name and "queries" not in name and not name.startswith(OTHERS)
    }
    assert [event.step for event in events.Scalars("train/loss")] == [6, 12]


@pytest.mark.parametrize("name", ["toy", "laptop", "gpu_24gb", "gpu_80gb", "node_8gpu", "sigma_moe_tiny"])
def test_a_shipped_config_names_its_machine_and_the_gpu_ones_a_logger(name):
    import yaml

    path = ROOT / f"scaled_configs/{name}.yaml"
    text, run = path.read_text("utf-8"), load_run([path], fit=True)
    assert yaml.safe_load(text)["telemetry"]["cluster"] == re.search(r"--cluster ([\w-]+)", text)[1]
    gpu = run.trainer["accelerator"] == "gpu"
    assert gpu == (run.trainer.get("logger", {}).get("class_path") == "lightning.pytorch.loggers.TensorBoardLogger")


@pytest.mark.parametrize("wrong, said", [({"every": -1}, "every=-1"), ({"cluster": "h10"}, "did you mean 'h100'")])
def test_settings_that_cannot_be(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Telemetry(**wrong)
