"""One command at a time writes into a folder: the second one is told in a sentence, and a killed one keeps nobody out."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from tiny import child, ending

from sigma_lite import cli, storage
from sigma_lite.lab.worker import train
from sigma_lite.storage import StorageError, exclusive
from sigma_lite.train.module import SigmaLit


def waits_for(file: str):
    """A trap: the child's first step says so and lasts until `file` is there."""

    def trap():
        original = SigmaLit.training_step

        def training_step(self, *args):
            Path("at work").touch()
            while not Path(file).exists():
                time.sleep(0.02)
            return original(self, *args)

        SigmaLit.training_step = training_step

    return trap


@pytest.fixture
def at_work(place):
    """A fit that stands in its first step, in another process."""
    pid = child(["fit", "-c", "tiny.yaml"], waits_for("go on"))
    while not Path("at work").exists():
        time.sleep(0.02)
    yield pid
    Path("go on").touch()


def test_a_second_command_is_refused_in_one_sentence(at_work, capsys):
    for line in ("fit -c tiny.yaml", "predict -c tiny.yaml", "report run"):
        before = tiny.snapshot(Path("run"))
        assert tiny.refused(cli.main, *line.split()) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("sigma-lite: another command is at work in run: wait") and "\n" not in said
        assert tiny.snapshot(Path("run")) == before
    Path("go on").touch()
    assert ending(at_work) == 0
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0


def test_a_killed_command_keeps_nobody_out(at_work, capsys):
    os.kill(at_work, signal.SIGKILL)
    assert ending(at_work) == -signal.SIGKILL
    assert Path("run/run.lock").exists()
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0


def test_a_worker_of_the_lab_waits_and_goes_on(at_work, capsys):
    worker = os.fork()
    if not worker:
        sys.stderr = open("worker.log", "w", buffering=1)  # noqa: SIM115
        shutil.copy("tiny.yaml", "run/run.yaml")
        train("run/run.yaml")
        os._exit(0)
    while not (Path("worker.log").exists() and "waiting for it" in Path("worker.log").read_text()):
        time.sleep(0.02)
    assert os.waitpid(worker, os.WNOHANG)[0] == 0
    Path("go on").touch()
    assert ending(at_work) == 0 and ending(worker) == 0


def test_a_command_that_fails_at_once_leaves_no_folder(place):
    tiny.write_config(place, "bad.yaml", data__corpus__path="nowhere", data__corpus__dir="new")
    assert tiny.refused(cli.main, "fit", "-c", "bad.yaml") == 2
    assert not Path("run").exists()


def holder(path: str, take: str = "with exclusive(sys.argv[1]): print('in', flush=True); time.sleep(600)"):
    """A process, of its own, that is inside."""
    import subprocess

    code = f"import sys, time\nfrom sigma_lite.storage import exclusive\n{take}"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def test_alone(tmp_path, capsys):
    path = tmp_path / "folder" / "lock"
    process = holder(str(path))
    with pytest.raises(StorageError, match="^not now$"), exclusive(path, refusal="not now"):
        pass
    process.kill()  # the lock goes with its holder
    process.wait()
    with exclusive(path, refusal="not now"), exclusive(path, refusal="not now"):  # a command inside a command
        assert path.exists()
    assert capsys.readouterr().err == ""


def test_a_forked_child_holds_nothing(tmp_path):
    """A data loader's worker may outlive a killed parent by seconds."""
    path = tmp_path / "lock"
    with exclusive(path):
        pid = os.fork()
        while pid and not (tmp_path / "forked").exists():
            time.sleep(0.02)
        if not pid:
            (tmp_path / "forked").touch()
            time.sleep(60)
            os._exit(0)
    with exclusive(path, refusal="the child holds it"):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_without_fcntl(tmp_path, monkeypatch, capsys):
    """Windows has byte locks of its own; a system without any says so, and keeps nobody out."""
    taken: dict[int, int] = {}

    def locking(descriptor: int, mode: int, size: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if any(other == inode and number != descriptor for number, other in taken.items()):
            raise PermissionError(errno.EACCES, "Permission denied")
        taken[descriptor] = inode

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with exclusive(tmp_path / "lock"):
        monkeypatch.setattr(storage, "_held", {})  # as in another process
        with pytest.raises(StorageError, match="not now"), exclusive(tmp_path / "lock", refusal="not now"):
            pass
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    for _ in range(2):
        with exclusive(tmp_path / "other"):
            pass
    assert capsys.readouterr().err.count("can have no locks: let one command at a time") == 1


def test_two_that_prepare(place, capsys):
    process = holder("other/tokenizer.lock")
    pid = child(["prepare", "-c", str(tiny.write_config(place, "other.yaml", data__corpus__dir="other"))])
    while not Path("child.log").exists() or "another command prepares other: waiting for it" not in Path(
        "child.log"
    ).read_text("utf-8"):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert ending(pid) == 0 and Path("other/manifest.json").exists()
