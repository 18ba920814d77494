"""A chapter in a real JupyterLab: Run All, then a slider moved with the keyboard."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
CHAPTER = "02_dense_decoder.ipynb"
STARTS_WITHIN = 120  # seconds
RUNS_WITHIN = 240_000  # milliseconds, on a busy machine

# figure data inside the output of the live widget, which has no slider of its own
LIVE = """() => {
  const figure = document.querySelector('.jupyter-widgets .js-plotly-plot');
  return figure ? JSON.stringify(figure.data.map(trace => trace.z || trace.y || trace.x)) : null;
}"""

CHANGED = "([live, before]) => { const now = eval(live)(); return now && now !== before; }"
DONE = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent);
  return prompts.length > 15 && prompts.every(prompt => /\\[\\d+\\]/.test(prompt));
}"""


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """Address of a JupyterLab with its own settings on a free port, with the chapters in a copy."""
    pytest.importorskip("jupyterlab", reason="the live notebooks need JupyterLab")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    own["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    environment = {**os.environ, **own, "SIGMA_FAST": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--notebook-dir={folder}", "--ServerApp.port_retries=0"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            _wait(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "log")
            yield f"http://127.0.0.1:{port}", token
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=20)
            server.kill()


def _wait(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    pytest.fail("JupyterLab did not start:\n" + log.read_text("utf-8", "replace")[-2000:])


def test_slider_moved_by_keyboard_changes_its_figure(page, lab):
    address, token = lab
    page.goto(f"{address}/lab/tree/notebooks/{CHAPTER}?reset&token={token}", timeout=120_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    page.wait_for_timeout(3000)  # Lab restores its layout after the first paint
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    page.wait_for_function(DONE, timeout=RUNS_WITHIN)
    handle = page.locator(".jupyter-widgets .noUi-handle").first
    handle.scroll_into_view_if_needed()
    page.wait_for_function(LIVE, timeout=60_000)
    before = page.evaluate(LIVE)
    readout = page.locator(".jupyter-widgets .widget-readout").first
    label = readout.inner_text()
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(CHANGED, arg=[LIVE, before], timeout=30_000)
    assert page.evaluate(LIVE) != before
    assert readout.inner_text() != label
    assert page.requests == []
