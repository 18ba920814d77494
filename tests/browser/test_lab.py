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
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from sigma_lite.saved_widgets import shown, states

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
  prompt => /\\[[\\d*]/.test(prompt.textContent) && prompt.textContent !== prompt.dataset.before)"""
RADIO = ".jupyter-widgets input[type=radio]"
CHOSEN = f"() => [...document.querySelectorAll('{RADIO}')].map(button => button.checked)"
SECOND = f"() => {{ const now = ({CHOSEN})(); return now.length > 1 && now[1] && now.filter(Boolean).length === 1; }}"
MARK = """() => document.querySelectorAll('.jp-CodeCell .jp-InputPrompt').forEach(
  prompt => { prompt.dataset.before = prompt.textContent; })"""
# Lab draws what is in view: from top to bottom, all guesses beside what was measured, cells with a figure, and how many
# widgets have no model.
LOOK_THROUGH = """async () => {
  const panel = document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer');
  const guesses = new Set(), figures = new Set();
  let lost = 0;
  for (let y = 0; y < panel.scrollHeight; y += 400) {
    panel.scrollTop = y;
    await new Promise(done => setTimeout(done, 700));
    document.querySelectorAll('[data-sigma-guess]').forEach(place => guesses.add(place.textContent));
    // a saved figure is shown as a picture until the mouse comes
    [...document.querySelectorAll('.js-plotly-plot, .plot-img')].filter(one => one.offsetWidth && one.naturalWidth !== 0)
      .forEach(one => figures.add(Number(one.closest('.jp-Cell').dataset.windowedListIndex)));
    lost += [...document.querySelectorAll('.jp-OutputArea-output')].filter(
      output => output.textContent.startsWith('Error displaying widget')).length;
  }
  return {guesses: [...guesses], figures: [...figures].sort((a, b) => a - b), lost};
}"""
FAILED = """() => [...document.querySelectorAll("[data-mime-type='application/vnd.jupyter.error']")]
  .map(output => output.textContent).join()"""
DONE = f"""() => {{
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  return ({FAILED})() || prompts.length > 15 && prompts.every(
    prompt => /\\[\\d+\\]/.test(prompt.textContent) && prompt.textContent !== prompt.dataset.before);
}}"""
# no cell waits for its turn, and not all have run
DROPPED = f"""() => !({DONE})() && ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(
  prompt => prompt.textContent.includes('*'))"""


class Lab(NamedTuple):
    address: str
    token: str
    notebooks: Path

    def kernels(self) -> list:
        with urllib.request.urlopen(f"{self.address}/api/kernels?token={self.token}", timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """A JupyterLab with its own settings on the first free port, with the chapters in a copy."""
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
            yield Lab(f"http://127.0.0.1:{_port(folder, token, server)}", token, folder / "notebooks")
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


def choose(page, menu: str, item: str, carried_out: Callable[[], bool]) -> None:
    """Lab drops a command that comes while it restores its layout, and says nothing: ask again."""
    for _ in range(20):
        try:
            page.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click(timeout=10_000)
            page.locator(".lm-Menu-itemLabel", has_text=item).first.click(timeout=10_000)
        except sync_api.TimeoutError:
            page.keyboard.press("Escape")  # the menu, if it is still open
        for _ in range(20):
            if carried_out():
                return
            page.wait_for_timeout(500)
    pytest.fail(f"{menu} > {item} does nothing")


def run_all_cells(page) -> None:
    """Every cell once more; returns when all have run. Now and then Lab starts a second kernel while it opens a chapter and
    lets go of all cells that were to run on the first: ask again."""
    for _ in range(5):
        page.evaluate(MARK)
        choose(page, "Run", "Run All Cells", lambda: page.evaluate(BEGUN))
        page.wait_for_function(f"() => ({DONE})() || ({DROPPED})()", timeout=RUNS_WITHIN)
        if page.evaluate(DONE):
            break
    assert page.evaluate(FAILED) == "", "no cell fails"
    assert page.evaluate(DONE), "every cell has run"


def save(page, file: Path) -> None:
    """From the menu; returns when a later file than before has the state of every widget that it shows."""
    before = file.stat().st_mtime_ns

    def saved() -> bool:
        try:
            notebook = json.loads(file.read_text("utf-8"))
        except json.JSONDecodeError:  # Lab is writing it
            return False
        return file.stat().st_mtime_ns > before and shown(notebook) <= (states(notebook) or {}).keys()

    choose(page, "File", "Save Notebook", saved)


def open_chapter(page, lab, chapter: str) -> None:
    page.goto(f"{lab.address}/lab/tree/notebooks/{chapter}?reset&token={lab.token}")
    page.wait_for_selector(READY, state="attached")
    page.wait_for_selector("#jupyterlab-splash", state="detached")


def look_through(page, wanted: str, figures: int = 3) -> dict:
    """What a reader sees, once this guess and so many figures are among it: on a busy machine Lab may still be drawing
    when we have passed."""
    for _ in range(5):
        seen = page.evaluate(LOOK_THROUGH)
        if wanted in seen["guesses"] and len(seen["figures"]) >= figures:
            break
    return seen


def reopen(page, lab, chapter: str, wanted: str, figures: int) -> dict:
    """What a reader sees who opens a saved chapter. A kernel that connects while JupyterLab still reads the saved widgets
    makes it say "Error displaying widget: model not found": then a reader reloads the page, twice if need be."""
    for _ in range(3):
        open_chapter(page, lab, chapter)
        with contextlib.suppress(sync_api.TimeoutError):
            page.wait_for_function(SECOND, timeout=60_000)
        seen = look_through(page, wanted, figures)
        if not seen["lost"]:
            break
    return seen


def test_slider_moved_by_keyboard_changes_its_figure(page, lab):
    open_chapter(page, lab, CHAPTER)
    run_all_cells(page)
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


@pytest.mark.parametrize("chapter", REOPENED)
def test_a_guess_stays_over_run_all_and_over_save_shutdown_and_opening_again(page, lab, chapter):
    open_chapter(page, lab, chapter)
    run_all_cells(page)
    button = page.locator(RADIO).nth(1)
    button.scroll_into_view_if_needed()
    wanted = urllib.parse.unquote(button.get_attribute("data-value"))
    button.check()
    seen = look_through(page, wanted)  # the cell that compares is not run again
    assert wanted in seen["guesses"] and seen["figures"] and seen["lost"] == 0
    run_all_cells(page)
    button.scroll_into_view_if_needed()
    page.wait_for_function(SECOND)

    file = lab.notebooks / chapter
    save(page, file)
    kernels = len(lab.kernels())  # a failed test may have left one
    choose(page, "Kernel", "Shut Down Kernel", lambda: len(lab.kernels()) < kernels)
    again = reopen(page, lab, chapter, wanted, len(seen["figures"]))  # with a kernel that has run nothing
    page.wait_for_function(SECOND)
    assert again == seen, "what was there is there again"
    save(page, file)  # JupyterLab by itself would leave out widgets that this kernel has not made
    picture = page.locator(".plot-img:visible").first.element_handle()
    picture.scroll_into_view_if_needed()
    picture.hover(force=True)  # the live figure takes the picture's place while the mouse still moves
    page.wait_for_function("picture => picture.offsetWidth === 0", arg=picture)

    run_all_cells(page)
    page.locator(RADIO).first.scroll_into_view_if_needed()
    page.wait_for_function(SECOND)  # the new kernel knows it too
    assert page.requests == []
