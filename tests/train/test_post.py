"""After pretraining, as stages of the same command: conversations with replay, longer rows, killed, measured apart."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from test_resume import before, diary, same
from tiny import child, ending

from sigma_lite import record
from sigma_lite.convert.calibrate import expert_inputs, training_rows
from sigma_lite.convert.distil import distil, divergence
from sigma_lite.convert.write import convert
from sigma_lite.data.mixture import RowsOfSources
from sigma_lite.data.of_run import data_of
from sigma_lite.data.rows import IGNORED
from sigma_lite.runfile import load_run
from sigma_lite.serve.answers import exact_match
from sigma_lite.serve.inside import costs, map_of_experts
from sigma_lite.serve.marked import at_hand, heldout
from sigma_lite.serve.rows import rows_of_step
from sigma_lite.serve.trained import Trained
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.run import RunCLI

POST = Path(__file__).parents[2] / "scaled_configs" / "post"
SOURCES = {
    "problems": {"source": "tasks", "tasks": ["add2", "sort3"], "max_documents": 400},
    "replay": {"source": "files", "path": "text", "heldout": 0.2},
}
STAGE = {
    "data__corpus": {"dir": "post", "tokenizer": "run/tokenizer.json", "heldout": 0.1},
    "data__mixture": {"sources": SOURCES, "weights": {"problems": 3, "replay": 1}},
    "data__rows": {"length": 64, "per_step": 4, "per_micro": 2},
    "model__sparsity": None,
    "trainer__max_steps": 8,
}
LONGER = {"rope_type": "yarn", "rope_factor": 2.0, "rope_original_length": 64}


def config(name: str, parent: str, **changes) -> list[str]:
    tiny.write_config(Path(), f"{name}.yaml", init_from=parent, trainer__default_root_dir=name, **STAGE | changes)
    return ["fit", "-c", f"{name}.yaml"]


def fit(name: str, parent: str, **changes) -> None:
    with RunCLI(config(name, parent, **changes)) as run:
        assert run.finished


@pytest.fixture(scope="module")
def staged(finished, tmp_path_factory) -> Path:
    """A folder with a pretrained run in run/ and a first stage in one/. Do not write into it."""
    folder = tmp_path_factory.mktemp("post")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit("one", "run")
    return folder


@pytest.fixture
def here(staged, tmp_path, monkeypatch) -> Path:
    shutil.copytree(staged, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def at(step: int):
    return before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == step)


def test_a_killed_stage_is_bitwise_the_one_that_was_not(here, staged):
    config("again", "run")
    for step in (1, 5):
        assert ending(child(["fit", "-c", "again.yaml"], at(step))) == -signal.SIGKILL
    fit("again", "run")
    same(tiny.state("again"), tiny.state("one"))
    seen = [[e for e in diary(Path(run)) if e["kind"] in ("step", "validation")] for run in ("again", "one")]
    assert seen[0] == seen[1] and len(seen[0]) == 8 + 2


def test_both_sources_are_measured_apart(staged, monkeypatch):
    """Bits per byte of problems are those of the answers, of replay those of the text; forgetting is read off the latter."""
    monkeypatch.chdir(staged)
    entry = record.read("one/record.jsonl", "validation")[-1]
    assert set(entry["sources"]) == {"problems", "replay"}
    trained = Trained("one")
    with RunCLI(["validate", "-c", "one.yaml"]) as run:
        loader = run.datamodule.val_dataloader()
        nats = dict.fromkeys((0, 1), 0.0)
        size = dict.fromkeys((0, 1), 0)
        for batch in loader:
            with torch.no_grad():
                found, _ = trained.model.nats(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
            for row, source in enumerate(batch.domains_B.tolist()):
                nats[source] += float(found[row].double().sum())
                size[source] += int(batch.bytes_BS[row].sum())
    for source, name in enumerate(SOURCES):
        bits = nats[source] / size[source] / math.log(2)
        assert entry["sources"][name]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_what_evaluation_holds_out_is_what_validation_does(staged, monkeypatch):
    """Of all sources and of each; what fills rows of conversations up is of no kind."""
    monkeypatch.chdir(staged)
    trained, entry = Trained("one"), record.read("one/record.jsonl", "validation")[-1]
    found = costs(trained, None, None)
    assert found["bits_per_byte"] == pytest.approx(entry["bits_per_byte"], rel=1e-6)
    for name, own in entry["sources"].items():
        assert found["by"]["domain"][name]["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-6)
    alone = costs(trained, "post/problems", None)
    assert alone["bits_per_byte"] == pytest.approx(entry["sources"]["problems"]["bits_per_byte"], rel=1e-6)
    some = at_hand(trained, None, 640)
    assert "10 of" in some.source and "held-out text in post" in some.source and some.domains == ("problems", "replay")
    whole = heldout(trained)
    filled_BS = whole.kinds_BS < 0
    assert filled_BS.any() and (whole.domains_BS[filled_BS] == -1).all()
    assert (whole.ids_BS[filled_BS] == trained.end_of_text).all() and (whole.targets_BS[filled_BS] == IGNORED).all()
    mapped = map_of_experts(trained, None, None)["layers"][0]["kind"]["counts"]
    assert sum(map(sum, mapped)) == int((~filled_BS).sum())


@dataclass(frozen=True)
class Looks:
    """A surgery that changes nothing, and keeps what it sees."""

    def __call__(self, model, rows):
        seen[:] = rows
        return model


seen: list = []


def test_a_stage_that_is_converted_is_measured_and_calibrated_as_it_was_trained(here):
    convert("one", "same", [Looks()], rows=6)
    own, (again,) = (record.read(f"{run}/record.jsonl", "validation") for run in ("one", "same"))
    assert again["bits_per_byte"] == pytest.approx(own[-1]["bits_per_byte"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(again["f"]), torch.tensor(own[-1]["f"]), atol=1e-4, rtol=0)
    with RunCLI(["validate", "-c", "one.yaml"]) as run:
        run.datamodule.setup("fit")
        rows = [*run.datamodule.training_rows().values()]
        order = run.datamodule.training_order().rows(0).tolist()
    whole = RowsOfSources(rows).__getitems__(order)
    assert torch.equal(torch.cat([batch.ids_BS for batch in seen])[:4], whole.ids_BS)
    assert torch.equal(torch.cat([batch.targets_BS for batch in seen])[:4], whole.targets_BS)
    assert load_run(["same/run.yaml"], fit=True).mixture.sources == SOURCES


def test_a_converted_run_keeps_its_rewards(here, monkeypatch):
    settings = {**Trained("one").settings, "reward": {"answers": 4}}
    monkeypatch.setattr("sigma_lite.convert.write.read_settings", lambda path: settings)
    convert("one", "same", [Looks()], rows=2)
    assert yaml.safe_load(Path("same/run.yaml").read_text("utf-8"))["model"]["reward"] == {"answers": 4}


def test_distillation_learns_what_an_assistant_says(here):
    """Other prompts' logits of the teacher change nothing."""
    (batch,) = training_rows(data_of(Trained("one").settings), 8)
    student, teacher = Trained("run").model, Trained("one").model
    scored_BS = batch.targets_BS != IGNORED
    assert 0 < scored_BS.sum() < batch.own_BS.sum()
    logits_BSV, of_teacher_BSV = (one(batch.ids_BS, documents_BS=batch.documents_BS).logits for one in (student, teacher))
    wanted = divergence(logits_BSV[scored_BS], of_teacher_BSV[scored_BS]).item()
    (first,) = distil(student, teacher, [batch], 1, learns=student.parameters(), balance=0.01)
    assert first == pytest.approx(wanted, rel=1e-5)
    for layers in expert_inputs(teacher, [batch]):
        assert {len(x_TD) for x_TD, _ in layers} == {len(r.ids) for _, r in layers} == {int(batch.own_BS.sum())}


def test_a_row_of_a_step_names_its_problems(staged, monkeypatch):
    monkeypatch.chdir(staged)
    rows = rows_of_step("one", 3)
    assert sorted(row["source"] for row in rows) == ["problems"] * 3 + ["replay"]
    for row in rows:
        named = [name.partition(":")[0] in ("add2", "sort3") for name in row["documents"]]
        assert named and all(named) == any(named) == (row["source"] == "problems")


def test_the_next_stage_has_longer_rows(here):
    fit("two", "one", **{f"model__net__{k}": v for k, v in LONGER.items()}, data__rows__length=128, trainer__max_steps=2)
    started = record.read("two/record.jsonl", "run")[0]["config"]["parent"]
    assert (started["how"], started["run"], started["step"]) == ("init_from", "one", 8)
    trained = Trained("two")
    assert trained.model.config.rope_scaling.factor == 2
    found = exact_match(trained, "add2", count=4)
    assert found["rows"] == 4 and 0 <= found["exact_match"] <= 1


def test_a_stage_learns_answers(here):
    """The loss falls by more than a third in 40 steps; from other weights the first step is another one."""
    fit("more", "run", trainer__max_steps=40, trainer__val_check_interval=40)
    lm = [e["terms"]["lm"] for e in record.read("more/record.jsonl", "step")]
    assert sum(lm[-5:]) < sum(lm[:5]) * 2 / 3
    fit("other", None, trainer__max_steps=2, trainer__val_check_interval=2)
    assert record.read("other/record.jsonl", "step")[0]["terms"]["lm"] != lm[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_stages_of_the_toy_are_runs(number):
    """Each begins with the one before; rows grow with RoPE and end shorter."""
    run = load_run([POST / f"sft{number}.yaml"], fit=True)
    toy = load_run([POST.parent / "toy.yaml"])
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "n_experts", "d_expert", "vocab_size"):
        assert getattr(run.net, name) == getattr(toy.net, name)
    assert run.mixture.sources["replay"]["heldout"] == toy.corpus.heldout, "nothing that pretraining held out is replayed"
    assert run.start.init_from == ("runs/toy", "runs/post/sft1", "runs/post/sft2")[number - 1]
    assert run.trainer["default_root_dir"] == f"runs/post/sft{number}"
    assert (run.rows.length, run.net.rope_factor) == ((256, 1), (512, 2), (256, 2))[number - 1]
