"""Chapters in a real JupyterLab: Run All, a slider moved with the keyboard; a guess that stays over Run All, save, shutdown
and opening again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
CHAPTER = "02_dense_decoder.ipynb"
REOPENED = ("01_text_to_rows.ipynb", "06_balance_loss.ipynb", "15_what_experts_know.ipynb")
STARTS_WITHIN = 600  # seconds, on a busy machine
RUNS_WITHIN = 600_000  # milliseconds

# figure data inside the output of the live widget, which has no slider of its own
LIVE = """() => {
  const figure = document.querySelector('.jupyter-widgets .js-plotly-plot');
  return figure ? JSON.stringify(figure.data.map(trace => trace.z || trace.y || trace.x)) : null;
}"""

CHANGED = "([live, before]) => { const now = eval(live)(); return now && now !== before; }"
READY = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='idle']"  # its kernel waits for work
BEGUN = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(
  prompt => /\\[[\\d*]/.test(prompt.textContent))"""
RADIO = ".jupyter-widgets input[type=radio]"
CHOSEN = f"() => [...document.querySelectorAll('{RADIO}')].map(button => button.checked)"
SECOND = f"() => {{ const now = ({CHOSEN})(); return now.length > 1 && now[1] && now.filter(Boolean).length === 1; }}"
MARK = """() => document.querySelectorAll('.jp-CodeCell .jp-InputPrompt').forEach(
  prompt => { prompt.dataset.before = prompt.textContent; })"""
AGAIN = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  return prompts.length > 15 && prompts.every(
    prompt => /\\[\\d+\\]/.test(prompt.textContent) && prompt.textContent !== prompt.dataset.before);
}"""
COMPARED = "() => [...document.querySelectorAll('[data-sigma-guess]')].map(place => place.textContent)"
DONE = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent);
  return prompts.length > 15 && prompts.every(prompt => /\\[\\d+\\]/.test(prompt));
}"""


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """Address of a JupyterLab with its own settings on the first free port, with the chapters in a copy."""
    pytest.importorskip("jupyterlab", reason="the live notebooks need JupyterLab")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    token = secrets.token_hex(16)
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    own["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "settings")
    own["JUPYTER_CONFIG_PATH"] = str(ROOT / "sigma_lite" / "teach" / "jupyter")  # which an installed package has in etc/
    own["SIGMA_GUESSES"] = str(folder / "guesses.json")
    environment = {**os.environ, **own, "SIGMA_FAST": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={token}", f"--notebook-dir={folder}", "--ServerApp.port_retries=1000"]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            yield f"http://127.0.0.1:{_port(folder, token, server)}", token
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=60)
            server.kill()


def _port(folder: Path, token: str, server: subprocess.Popen) -> int:
    """Where it listens, once it answers."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and server.poll() is None:
        for path in folder.glob("jupyter_runtime_dir/jpserver-*.json"):
            with contextlib.suppress(OSError, ValueError):
                port = json.loads(path.read_bytes())["port"]
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=60).close()
                return port
        time.sleep(0.5)
    pytest.fail("JupyterLab did not start:\n" + (folder / "log").read_text("utf-8", "replace")[-2000:])


def choose(page, menu: str, item: str, until: str) -> None:
    """Lab drops a command that comes while it restores its layout, and says nothing: ask until something shows."""
    for _ in range(20):
        try:
            page.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click(timeout=10_000)
            page.locator(".lm-Menu-itemLabel", has_text=item).first.click(timeout=10_000)
            page.wait_for_function(until, timeout=10_000)
            return
        except sync_api.TimeoutError:
            page.keyboard.press("Escape")  # the menu, if it is still open
    pytest.fail(f"{menu} > {item} does nothing")


def run_all_cells(page) -> None:
    choose(page, "Run", "Run All Cells", BEGUN)


def open_chapter(page, lab, chapter: str) -> None:
    address, token = lab
    page.goto(f"{address}/lab/tree/notebooks/{chapter}?reset&token={token}")
    page.wait_for_selector(READY, state="attached")
    page.wait_for_selector("#jupyterlab-splash", state="detached")


def test_slider_moved_by_keyboard_changes_its_figure(page, lab):
    open_chapter(page, lab, CHAPTER)
    run_all_cells(page)
    page.wait_for_function(DONE, timeout=RUNS_WITHIN)
    handle = page.locator(".jupyter-widgets .noUi-handle").first
    handle.scroll_into_view_if_needed()
    page.wait_for_function(LIVE)
    before = page.evaluate(LIVE)
    readout = page.locator(".jupyter-widgets .widget-readout").first
    label = readout.inner_text()
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(CHANGED, arg=[LIVE, before])
    assert page.evaluate(LIVE) != before
    sync_api.expect(readout).not_to_have_text(label, timeout=RUNS_WITHIN)
    assert page.requests == []


def sessions(lab) -> list:
    address, token = lab
    with urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("chapter", REOPENED)
def test_a_guess_stays_over_run_all_and_over_save_shutdown_and_opening_again(page, lab, chapter, tmp_path):
    open_chapter(page, lab, chapter)
    run_all_cells(page)
    page.wait_for_function(DONE, timeout=RUNS_WITHIN)
    button = page.locator(RADIO).nth(1)
    button.scroll_into_view_if_needed()
    wanted = button.locator("xpath=..").inner_text().strip()
    button.check()
    page.wait_for_function(f"(wanted) => ({COMPARED})().includes(wanted)", arg=wanted)  # the comparison follows, not run again
    page.evaluate(MARK)
    run_all_cells(page)
    page.wait_for_function(AGAIN, timeout=RUNS_WITHIN)
    page.wait_for_function(SECOND)

    choose(page, "File", "Save Notebook", "() => !document.querySelector('.jp-NotebookPanel.jp-mod-dirty, .lm-mod-current.jp-mod-dirty')")
    for session in sessions(lab):
        stop(lab, session["id"])
    open_chapter(page, lab, chapter)  # with a kernel that has run nothing
    page.wait_for_function(SECOND)
    page.wait_for_selector(".jp-OutputArea-output .js-plotly-plot .main-svg", state="attached")
    assert wanted in page.evaluate(COMPARED)
    assert page.locator("text=Error displaying widget").count() == 0

    run_all_cells(page)
    page.wait_for_function(DONE, timeout=RUNS_WITHIN)
    page.wait_for_function(SECOND)  # the new kernel knows it too
    assert wanted in page.evaluate(COMPARED)
    assert page.requests == []
