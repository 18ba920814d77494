"""JupyterLab's server keeps the saved widgets of a notebook until they are run again.

JupyterLab writes the state of those widgets alone that the present kernel has made (jupyter-widgets/ipywidgets, issue 3270).
So a chapter that is opened the next day, and that JupyterLab saves by itself after two minutes, loses its sliders and
guesses: they read "Error displaying widget: model not found" from then on.

The server loads this module as an extension: `etc/jupyter/jupyter_server_config.d/sigma_lite.json` of an installed package.
It must stay cheap to import: no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def _jupyter_server_extension_points() -> list[dict]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    server.contents_manager.register_pre_save_hook(keep_widgets)


def keep_widgets(model: dict, path: str, contents_manager: Any, **_: Any) -> None:
    """Before the server writes a notebook: give a widget that is shown, and has no state, the one that the file has.

    A reader who switched the saving of widgets off has no states in the notebook: then there is nothing to keep.
    """
    notebook, root = model.get("content"), getattr(contents_manager, "root_dir", None)
    if model.get("type") != "notebook" or not notebook or root is None or (kept := states(notebook)) is None:
        return
    if missing := shown(notebook) - kept.keys():
        file = Path(root, path.strip("/"))
        before = states(json.loads(file.read_text("utf-8"))) if file.exists() else None
        kept.update(with_parts(missing, before or {}))


def shown(notebook: Mapping) -> set[str]:
    """Ids of the widgets that the outputs of its cells show."""
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    views = (output.get("data", {}).get(VIEW) for output in outputs)
    return {view["model_id"] for view in views if view and view.get("model_id")}


def states(notebook: Mapping) -> dict[str, dict] | None:
    """id -> state of the widgets that are saved in it; None: nothing saves them."""
    return notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state")


def with_parts(ids: Iterable[str], known: Mapping[str, dict]) -> dict[str, dict]:
    """Of the known states those of these widgets, and of the widgets inside them."""
    found, waiting = {}, list(ids)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found[name] = known[name]
            waiting += re.findall(r"IPY_MODEL_(\w+)", json.dumps(known[name]))
    return found
