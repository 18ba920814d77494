"""What Windows, a Mac's GPU and a terminal that knows ASCII only lack, taken away here: the commands work without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sigma_lite import cli
from sigma_lite.config import BalanceConfig, ModelConfig
from sigma_lite.kernels.choose import choose_backend
from sigma_lite.runfile import from_mapping
from sigma_lite.storage import readable
from sigma_lite.train.module import SigmaLit

ROOT = Path(__file__).parents[1]
NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")

WITHOUT = """
import errno, importlib, os, pkgutil, signal, sys
import filelock, jsonargparse, lightning.pytorch, plotly.offline, tokenizers, torch, torch._dynamo, tqdm, yaml
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGKILL", "SIGQUIT", "SIGCHLD", "SIGSTOP", "setitimer"):
    delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "sched_getaffinity", "getloadavg", "killpg", "getpgid", "uname", "sysconf"):
    delattr(os, name)
del errno.EDQUOT
lightning.pytorch.trainer.connectors.signal_connector._IS_WINDOWS = True  # Lightning asks for the name of the system
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
signal.valid_signals = lambda: {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
import sigma_lite
for module in pkgutil.walk_packages(sigma_lite.__path__, "sigma_lite."):
    if not module.name.endswith("__main__") and "kernels.compile_offline" not in module.name:
        importlib.import_module(module.name)
from sigma_lite import cli
for command in (["fit", "-c", "tiny.yaml"], ["report", "run"], ["generate", "run", "--max-new-tokens", "3"]):
    cli.main(command)
"""


@pytest.mark.slow
def test_a_run_without_what_windows_lacks(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits per byte" in done.stdout


def test_stopping_works_without_the_signal_that_windows_lacks():
    code = "import signal; del signal.SIGUSR1\nfrom sigma_lite.train.callbacks import stop\n"
    code += "assert stop.SIGNALS == (signal.SIGTERM, signal.SIGINT) and not stop.Stopped(signal.SIGTERM).requeue"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_every_file_is_opened_in_a_named_encoding(place):
    """On Windows the default is the country's: what one machine writes, another would read otherwise."""
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "default::EncodingWarning", "-m", "sigma_lite"]
    for args in (["fit", "-c", "tiny.yaml"], ["plan", "-c", "tiny.yaml"], ["report", "run"], ["lab", "list"]):
        done = subprocess.run([*command, *args], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        ours = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and f"{ROOT}/sigma_lite" in line]
        assert not ours


# ------------------------------------------------------------------------------------------------------------- a Mac


class NoFloat64(TorchDispatchMode):
    """As MPS: an operation that gives a float64 tensor is a TypeError."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"{func} gives float64, which MPS lacks")
        return out


def test_no_state_that_lightning_moves_is_float64():
    made = SigmaLit(NET)
    made.configure_model()
    states = [
        (name, value) for name, metric in made.named_modules() for name, value in getattr(metric, "_defaults", {}).items()
    ]
    assert len(states) > 6
    moved = [*states, *made.named_parameters(), *made.named_buffers()]
    assert [name for name, value in moved if value.dtype == torch.float64] == []


@pytest.mark.parametrize("balance", [{}, {"loss": "sequence"}, {"loss": "top1"}, {"bias": "sign", "loss": "none"}])
def test_a_step_and_its_measures_make_no_float64(corpus_and_data, monkeypatch, balance):
    from sigma_lite.data.rows import Rows
    from sigma_lite.data.shards import load

    prepared = load(corpus_and_data / "prepared")
    batch = Rows(prepared.heldout, prepared.token_bytes, 32, padded=True).__getitems__([0, 1])
    monkeypatch.setenv("SIGMA_LITE_BACKEND", "loop")  # as on a Mac; a CPU's own kernel is compared with float64 first
    with NoFloat64():
        made = SigmaLit(NET, balance=BalanceConfig(**balance))
        made.log = lambda *_, **__: None
        made.configure_model()
        optimizer = torch.optim.AdamW(made.parameters())
        made.training_step(batch, 0)["loss"].backward()
        made.gradient_norm()
        optimizer.step()
        with torch.no_grad():
            made.validation_step(batch, 0)
        made.heldout_load.load()
        assert made.heldout_bits.compute()["bits_per_byte"] > 0


def test_a_mac_runs_the_specification():
    x = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32, element_size=lambda: 4)
    w13 = SimpleNamespace(shape=(8, 32, 32), device=x.device, dtype=x.dtype)
    assert choose_backend(x, w13) == ("loop", "mps, on which grouped_mm was never tried")


# -------------------------------------------------------------------------------------------------------- a terminal

ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def in_ascii(*args: str) -> tuple[int, bytes]:
    command = [sys.executable, "-m", "sigma_lite", *args]
    done = subprocess.run(
        [os.fsencode(part) for part in command], env={**os.environ, **ASCII, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_command_in_a_terminal_of_ascii(place):
    """Names with an accent, in the config and on the command line: the files are those of any other terminal."""
    os.rename("text", "texte \u00e9")
    tiny.write_config(
        place,
        "\u00e9.yaml",
        data__corpus__path="texte \u00e9",
        data__corpus__dir="pr\u00eat",
        trainer__default_root_dir="run \u00e9",
    )
    for args in (
        ("prepare", "-c", "\u00e9.yaml"),
        ("plan", "-c", "\u00e9.yaml"),
        ("fit", "-c", "\u00e9.yaml", "--print_config"),
        ("fit", "-c", "\u00e9.yaml"),
        ("validate", "-c", "\u00e9.yaml"),
        ("predict", "-c", "\u00e9.yaml"),
        ("report", "run \u00e9"),
        ("generate", "run \u00e9", "--max-new-tokens", "2", "--prompt", "caf\u00e9"),
        ("lab", "list"),
        ("--help",),
    ):
        code, printed = in_ascii(*args)
        assert code == 0, (args, printed[-2000:])
        assert printed.isascii(), (args, printed)
    assert Path("run \u00e9/report.html").exists() and Path("pr\u00eat").is_dir()
    code, printed = in_ascii("plan", "-c", "nirgends \u00e9.yaml")
    assert code == 2 and b"Traceback" not in printed


def test_a_folder_and_a_prompt_of_other_bytes(finished, tmp_path, monkeypatch, capfdbinary):
    """Bytes that are no UTF-8 reach Python as lone surrogates, which neither a page nor a tokenizer can hold."""
    name = b"run \xe9".decode("utf-8", "surrogateescape")
    monkeypatch.chdir(tmp_path)
    try:
        shutil.copytree(finished / "run", name)
    except OSError:
        pytest.skip("this disk takes only names in UTF-8")
    cli.main(["report", name, "--out", "page.html"])
    assert "run \\xe9" in Path("page.html").read_text("utf-8")
    data = str(finished / "prepared")
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert tiny.refused(cli.main, "generate", name, "--data", data, "--max-new-tokens", "0", "--prompt", prompt) == 2
    assert b"the prompt is not UTF-8 (byte 0xe9" in capfdbinary.readouterr().err


def test_bytes_that_were_utf8_are_read_again():
    assert (
        readable("caf\udcc3\udca9") == "caf\u00e9" and readable("caf\u00e9") == "caf\u00e9" and readable("\udce9") == "\\xe9"
    )
