"""Runs each notebook once and hands Sphinx the result; the files in notebooks/ stay free of outputs.

A result is kept under book/_build/executed/ and used again until the notebook, or a file of the package that its kernel
imported, changes. (jupyter-cache looks at the notebook only, and would show yesterday's package.)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import nbclient
import nbformat
from sphinx.errors import ExtensionError
from sphinx.util.display import progress_message
from tqdm import tqdm

from sigma_lite.storage import exclusive

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "book" / "_build" / "executed"
CELL_SECONDS = 600
# runs after the last cell, in the reader's kernel, and leaves the notebook again
ASK = """import json, os, sys
files = [m.__file__ for name, m in sys.modules.items() if name.startswith("sigma_lite") and m.__file__]
print(json.dumps([sum(os.times()[:4]), files]))"""


class Executed(NamedTuple):
    path: Path  # notebook with outputs
    seconds: float  # of processor time that its kernel took, start included: other programs disturb that least
    fresh: bool  # False: taken from the store


def execute(notebook: Path, *, fast: bool | None = None) -> Executed:
    """Run a notebook in its own folder, or take the stored run if nothing that it read has changed.

    Raises: nbclient.exceptions.CellExecutionError with the cell and its traceback.
    """
    fast = os.environ.get("SIGMA_FAST", "0") not in ("", "0") if fast is None else fast
    store = STORE / ("fast" if fast else "full")
    with exclusive(store / f"{notebook.stem}.lock"):  # tests run side by side, and two of them want the same chapters
        return _executed(notebook, fast, store)


def _executed(notebook: Path, fast: bool, store: Path) -> Executed:
    target, facts = store / notebook.name, store / (notebook.stem + ".json")
    if target.exists() and facts.exists():
        known = json.loads(facts.read_text("utf-8"))
        if known["inputs"] == digest(notebook, known["files"]):
            return Executed(target, known["seconds"], fresh=False)
    content = nbformat.read(notebook, as_version=4)
    seconds, files = _run(content, fast, notebook)
    nbformat.write(content, target)
    facts.write_text(json.dumps({"inputs": digest(notebook, files), "files": files, "seconds": seconds}), "utf-8")
    return Executed(target, seconds, fresh=True)


def _run(content: nbformat.NotebookNode, fast: bool, notebook: Path) -> tuple[float, list[str]]:
    """Fill in the outputs; returns seconds, and the package files that the kernel imported, relative to the repository."""
    content.cells.append(nbformat.v4.new_code_cell(ASK))
    with tqdm(total=len(content.cells), desc=notebook.stem, unit="cell", disable=None, leave=False) as bar:
        client = nbclient.NotebookClient(
            content,
            timeout=CELL_SECONDS,
            startup_timeout=CELL_SECONDS,
            kernel_name="python3",
            on_cell_complete=lambda **_: bar.update(),
            resources={"metadata": {"path": str(notebook.parent)}},
        )
        own = {"SIGMA_FAST": "1" if fast else "0", "SIGMA_GUESSES": "", "PYTHONPATH": str(ROOT)}  # nobody's guesses
        client.execute(env={**os.environ, **own})
    answer = content.cells.pop()
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # time stamps: two runs with the same result should be the same file
    seconds, files = json.loads(answer.outputs[0]["text"])
    return seconds, sorted(os.path.relpath(path, ROOT) for path in files)


def digest(notebook: Path, files: list[str]) -> str:
    """Of the cells' source and the files' bytes; where the chapter reads recorded runs, of those too."""
    if any(name.endswith("lab/results.py") for name in files):
        files = [*files, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("results/lab/*.json"))]
    cells = [[cell.cell_type, cell.source] for cell in nbformat.read(notebook, as_version=4).cells]
    state = hashlib.sha256(json.dumps(cells).encode())
    for name in files:
        path = ROOT / name
        state.update(path.read_bytes() if path.exists() else b"gone")
    return state.hexdigest()


def outdated(app, env, added, changed, removed) -> list[str]:
    """Run what must be run, before Sphinx reads anything; returns the documents whose outputs are new."""
    chapters = [docname for docname in sorted(env.found_docs) if os.fspath(env.doc2path(docname)).endswith(".ipynb")]
    again = []
    for docname in chapters:
        path = Path(env.doc2path(docname))
        with progress_message(path.name):
            try:
                result = execute(path)
            except nbclient.exceptions.CellExecutionError as error:
                raise ExtensionError(f"{path.name} does not run:\n{error}") from error
        again += [docname] if result.fresh else []
        app.executed_paths[docname] = result.path
    return again


def numbered(content: dict, number: int) -> dict:
    """The notebook with its number before its title. Sphinx would count the files, and some numbers are not taken yet."""
    first, *rest = content["cells"]
    lines = "".join(first["source"]).splitlines(keepends=True)
    title = lines[0].replace("# ", f"# {number} · ", 1)
    return content | {"cells": [first | {"source": [title, *lines[1:]]}, *rest]}


def quiet(content: dict) -> dict:
    """The notebook with the calls hidden whose result says all: folds with hints and solutions."""
    for cell in content["cells"]:
        if "".join(cell["source"]).startswith("teach.solution("):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "remove-input"]
    return content


def hand_over(app, docname: str, source: list[str]) -> None:
    if docname in app.executed_paths:
        path = app.executed_paths[docname]
        content = quiet(json.loads(path.read_text("utf-8")))
        source[0] = json.dumps(numbered(content, int(path.name[:2])))


def setup(app):
    app.executed_paths = {}
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", hand_over)
    return {"parallel_read_safe": False, "parallel_write_safe": True, "version": "1"}
