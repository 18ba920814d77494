"""JupyterLab's server keeps what JupyterLab itself forgets: the state of widgets that no kernel has made."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sigma_lite.saved_widgets import STATE, VIEW, keep_widgets, shown, states, with_parts

ROOT = Path(__file__).parents[2]
BOX = {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_radio1"], "layout": "IPY_MODEL_layout1"}}
SAVED = {"box1": BOX, "radio1": {"state": {"index": 1}}, "layout1": {"state": {}}, "old": {"state": {"index": 9}}}


def notebook(state: dict | None, *ids: str) -> dict:
    """A valid notebook whose cells show these widgets."""
    view = [{"output_type": "display_data", "metadata": {}, "data": {VIEW: {"model_id": one}}} for one in ids]
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ""},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": "", "execution_count": None, "outputs": view},
    ]
    kept = {} if state is None else {"widgets": {STATE: {"version_major": 2, "version_minor": 0, "state": state}}}
    return {"cells": cells, "metadata": kept, "nbformat": 4, "nbformat_minor": 5}


def test_a_widget_comes_with_the_widgets_inside_it_and_no_others():
    assert with_parts(["box1"], SAVED).keys() == {"box1", "radio1", "layout1"}
    assert with_parts(["gone"], SAVED) == {}
    circle = {"a": {"state": "IPY_MODEL_b"}, "b": {"state": "IPY_MODEL_a"}}
    assert with_parts(["a"], circle) == circle


@pytest.fixture
def server(tmp_path):
    """What stores notebooks in a JupyterLab that has loaded the extension."""
    manager = pytest.importorskip("jupyter_server.services.contents.largefilemanager", reason="comes with JupyterLab")
    contents = manager.AsyncLargeFileManager(root_dir=str(tmp_path))
    contents.register_pre_save_hook(keep_widgets)

    def save(content: dict) -> dict:
        model = {"type": "notebook", "format": "json", "content": copy.deepcopy(content)}
        asyncio.run(contents.save(model, "/folder/chapter.ipynb"))
        return json.loads((tmp_path / "folder/chapter.ipynb").read_text("utf-8"))

    (tmp_path / "folder").mkdir()
    return save


def test_a_save_without_a_kernel_loses_nothing(server):
    assert states(server(notebook(SAVED, "box1"))) == SAVED
    again = states(server(notebook({}, "box1")))  # what JupyterLab writes of a chapter that was opened and not run
    assert again == {name: SAVED[name] for name in ("box1", "radio1", "layout1")}
    assert states(server(notebook({}, "box1"))) == again, "however often"


def test_what_was_run_again_is_new_and_what_is_no_longer_shown_goes(server):
    server(notebook(SAVED, "box1", "old"))
    fresh = {"old": {"state": {"index": 2}}}
    found = states(server(notebook(fresh, "box1", "old")))
    assert found["old"] == fresh["old"] and found["box1"] == BOX
    assert states(server(notebook(fresh, "old"))) == fresh


def test_a_reader_who_saves_no_widgets_gets_none(server):
    server(notebook(SAVED, "box1"))
    assert states(server(notebook(None, "box1"))) is None


@pytest.mark.parametrize("model", [{"type": "file", "content": "text"}, {"type": "notebook"}, {"type": "directory"}])
def test_other_files_are_left_alone(model, tmp_path):
    before = copy.deepcopy(model)
    keep_widgets(model=model, path="a", contents_manager=type("Contents", (), {"root_dir": str(tmp_path)}))
    assert model == before


def test_a_store_that_is_no_folder_is_left_alone():
    model = {"type": "notebook", "content": notebook({}, "box1")}
    keep_widgets(model=model, path="a.ipynb", contents_manager=object())
    assert states(model["content"]) == {} and shown(model["content"]) == {"box1"}


def test_jupyters_server_finds_the_extension_and_it_is_cheap(tmp_path):
    """The configuration that an installed package has in etc/jupyter, read by the server's own code."""
    pytest.importorskip("jupyter_server")
    code = (
        "import sys\n"
        "from jupyter_server.extension.config import ExtensionConfigManager\n"
        "from jupyter_server.extension.manager import ExtensionPackage\n"
        f"manager = ExtensionConfigManager(read_config_path=[{str(ROOT / 'sigma_lite/teach/jupyter')!r}])\n"
        "(name,) = [name for name, on in manager.get_jpserver_extensions().items() if on]\n"
        "package = ExtensionPackage(name=name, enabled=True)\n"
        "assert package.validate() and 'torch' not in sys.modules and 'ipywidgets' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
