"""Chapter 18's lab: each safeguard is one line of the source, each has a run that fails without it, and nothing is claimed
for a GPU that is not there."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from sigma_lite.config import ConfigError
from sigma_lite.kernels.compile_offline import Layer
from sigma_lite.kernels.compiler import BuildError
from sigma_lite.kernels.cuda import binding
from sigma_lite.kernels.cuda.build import SOURCES
from sigma_lite.teach import cuda_lab, gpu_race
from sigma_lite.teach.plots_cuda import RIGHT
from sigma_lite.teach.session import recorded

compiles = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
BACKWARDS, ODD = {"round sizes, backwards", "odd sizes, backwards"}, {"odd sizes", "odd sizes, backwards"}
WITNESS = {  # the runs in which the kernel without it is wrong
    "nothing": set(),
    "swizzle": set(),
    "wait": BACKWARDS,
    "barrier": BACKWARDS | ODD | {"round sizes"},
    "row mask": BACKWARDS,
    "zero fill": ODD,
    "last commits": BACKWARDS,
}


def wrong(trials: dict) -> dict[str, set[str]]:
    runs = {name: {run: e for run, e in errors.items() if run != "conflicts"} for name, errors in trials.items()}
    return {name: {run for run, error in errors.items() if not error <= RIGHT} for name, errors in runs.items()}


def kept() -> dict:
    return json.loads(recorded(cuda_lab.RECORD).read_text("utf-8"))["safeguards"]


def test_every_safeguard_is_one_line_of_the_source_and_has_a_switch():
    texts, before = cuda_lab.planted(), {source.name: source.read_text("utf-8") for source in SOURCES}
    assert sum(text.count("broken ") for text in texts.values()) >= len(cuda_lab.SAFEGUARDS)
    changed = {name for name, text in texts.items() if text != before[name]}
    assert changed == {guard.file for guard in cuda_lab.SAFEGUARDS.values()}


def test_a_line_that_has_left_the_source_is_named(monkeypatch):
    gone = cuda_lab.SAFEGUARDS["wait"]._replace(line="copy_wait<7>();")
    monkeypatch.setitem(cuda_lab.SAFEGUARDS, "wait", gone)
    with pytest.raises(ConfigError, match="'wait' is no longer one line of tile.cuh"):
        cuda_lab.planted()


def test_the_record_says_what_the_chapter_says():
    """Five of six are right forwards and with round sizes, and each has a witness."""
    assert wrong(kept()) == WITNESS
    assert kept()["nothing"]["conflicts"] == 0 < kept()["swizzle"]["conflicts"]


@compiles
@pytest.mark.slow
def test_the_broken_kernels_do_it_here_too():
    trials = cuda_lab.trials()
    assert wrong(trials) == WITNESS
    assert trials["swizzle"]["conflicts"] == kept()["swizzle"]["conflicts"]
    whole = cuda_lab.run("last commits", D=64, F=64, late=True), cuda_lab.run("last commits", D=128, F=64, late=True)
    assert whole[0].error <= RIGHT and math.isnan(whole[1].error), "with one slice there is no last commit to miss"
    with pytest.raises(ConfigError, match="no safeguard; they are swizzle, wait"):
        cuda_lab.run("mask")


def test_without_a_compiler_the_record_is_read(monkeypatch, capsys):
    def no_compiler():
        raise BuildError("the emulator needs a C++ compiler: install g++ or set CXX")

    monkeypatch.setattr(cuda_lab, "library", no_compiler)
    trials = cuda_lab.trials()
    assert wrong(trials) == WITNESS and list(trials) == list(WITNESS)
    assert "install g++ or set CXX; these are the recorded results" in capsys.readouterr().out


def test_without_nvcc_the_recorded_registers_are_read(monkeypatch, capsys):
    def no_nvcc(capability):
        raise BuildError("found no nvcc on PATH")

    monkeypatch.delenv("SIGMA_FAST", raising=False)
    monkeypatch.setattr(cuda_lab, "compiled_resources", no_nvcc)
    assert cuda_lab.build_report((9, 0))["up<bf16, 128>"].spilled == 0
    said = capsys.readouterr().out
    assert "found no nvcc" in said and "as recorded with nvcc" in said


def test_without_a_gpu_the_race_says_what_it_would_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_race.race() is None
    assert capsys.readouterr().out.startswith("no GPU here. On a GPU this cell would check both kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5, and the kernel needs 8.0" in gpu_race.obstacle()


@compiles
def test_the_race_checks_then_times_and_draws(monkeypatch, capsys):
    """On the emulator, where times mean nothing."""
    monkeypatch.setenv(binding.EMULATE, "1")
    figure = gpu_race.race(40, Layer(E=2, D=64, F=32), device="cpu", square=64, copied=2**16)
    said = capsys.readouterr().out
    assert said.count("from the float64 loop") == 2 and said.count("of the roof") == 2
    names = [trace.name for trace in figure.data]
    assert any(name.startswith("cuda: ") for name in names) and any(name.startswith("grouped: ") for name in names)


def test_a_wrong_kernel_gets_no_time(monkeypatch, capsys):
    right = gpu_race.grouped_swiglu
    spoil = {"grouped": 1.1, "loop": 1}
    monkeypatch.setattr(
        gpu_race, "grouped_swiglu", lambda *inputs, backend: spoil[backend] * right(*inputs, backend=backend)
    )
    monkeypatch.delenv(binding.EMULATE, raising=False)
    laps = gpu_race.timed(40, Layer(E=2, D=64, F=32), torch.device("cpu"))
    said = capsys.readouterr().out
    assert laps == {} and "which is wrong, so it is not timed" in said and "cuda: backend 'cuda' cannot run this" in said
