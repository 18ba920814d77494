"""A real browser, without a network: what a reader of the book and a user of the notebooks get to see.

Needs the package `playwright` and a chromium that is already installed; SIGMA_CHROMIUM names another one. SIGMA_SITE names
the folder of a book that is built already, such as book/_build/html: building it takes most of these tests' time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sigma_lite.storage import exclusive

ROOT = Path(__file__).parents[2]
BUILT = ".built"  # beside a site that is whole


def pytest_collection_modifyitems(items):
    """All of them wait for the book to be built."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


FLAGS = [
    "--no-sandbox",  # containers run as root
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


PATIENCE_MS = 240_000  # for whatever a page is waited for, on a busy machine


@pytest.fixture(scope="module")
def chromium():
    """A headless browser with a fresh profile. Its event loop ends with the file: other files run loops of their own."""
    path = os.environ.get("SIGMA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium on this machine: install one, or set SIGMA_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    """new_page(...) in a context of its own, with these options."""
    contexts = []

    def make(**options):
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        return contexts[-1].new_page()

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page):
    """A page that keeps account: `page.requests` to anywhere but the disk, `page.faults` of its scripts,
    also those that only the console shows."""
    page = new_page(viewport={"width": 1300, "height": 1000})
    page.requests, page.faults = [], []
    local = ("file:", "data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:")
    page.on("request", lambda request: None if request.url.startswith(local) else page.requests.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    return page


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The book, built with chapters that train a few steps. Processes that share out the tests build one."""
    if built := os.environ.get("SIGMA_SITE"):
        return Path(built).resolve()
    together = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"book-{together}" if together else tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "book", ".", str(folder)]
    with exclusive(folder.with_suffix(".lock")):
        if not (folder / BUILT).exists():
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SIGMA_FAST": "1"}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / BUILT).touch()
    return folder
