"""A figure as a file for README and slides. Needs kaleido and a Chrome or Chromium; nothing else in sigma_lite does."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import plotly.graph_objects as go

from sigma_lite.storage import StorageError, atomic_write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def static_svg(fig: go.Figure, path: str | Path, width: int = 860, height: int | None = None) -> Path:
    """Write a figure as SVG, without its menus and sliders; the same figure gives the same bytes.

    The browser is $BROWSER_PATH, or a Chrome or Chromium on $PATH. Raises StorageError with the fix when kaleido or the
    browser is missing, or the file cannot be written.
    """
    path, picture = Path(path), go.Figure(fig)
    picture.layout.updatemenus = picture.layout.sliders = ()
    for place, trace in enumerate(picture.data):
        trace.uid = f"trace{place}"  # plotly.js would draw a random one
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found:
        os.environ.setdefault("BROWSER_PATH", found)
    try:
        svg = picture.to_image(format="svg", width=width, height=height or fig.layout.height).decode()
    except (ImportError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"cannot draw {path}: {' '.join(str(error).split())[:200]}; pip install kaleido, and set BROWSER_PATH to a"
            " Chrome or Chromium"
        ) from error
    with atomic_write(path) as file:
        file.write(_without_random_ids(svg).encode())
    return path


def _without_random_ids(svg: str) -> str:
    """plotly.js draws an id for each picture; a fixed one leaves a committed file unchanged when it is redrawn."""
    match = re.search(r'id="defs-([0-9a-f]+)"', svg)
    return svg.replace(match.group(1), "fig") if match else svg
