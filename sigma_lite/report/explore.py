"""A text coloured by its experts as one HTML file: choose a layer, a token, an expert. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from sigma_lite import __version__
from sigma_lite.report import markup
from sigma_lite.report.document import page_part
from sigma_lite.storage import atomic_write, readable


def write_explorer(facts: Mapping[str, Any], title: str, out: str | Path) -> Path:
    """Write the page and return its path. Raises StorageError where it cannot be written."""
    with atomic_write(out) as file:
        file.write(readable(page(facts, title)).encode())
    return Path(out)


def page(facts: Mapping[str, Any], title: str) -> str:
    """The page as text; `facts` are those of serve/explore.py."""
    script = page_part("explore.js")
    return Template(page_part("explore.html")).substitute(
        hash=markup.script_hash(script),
        version=markup.escape(__version__),
        title=markup.escape(title),
        css=page_part("page.css") + page_part("explore.css"),
        lead=markup.escape(_lead(facts)),
        footer=markup.paragraph(f"Made by sigma_lite {__version__}; this file loads nothing from anywhere."),
        facts=markup.data("facts", facts),
        script=script,
    )


def _lead(facts: Mapping[str, Any]) -> str:
    tokens, layers = len(facts["tokens"]), len(facts["experts"])
    shape = f"step {facts['step']:,} · {tokens:,} tokens, {layers} layers of {facts['n_experts']} experts"
    rows = f" · read in rows of {facts['length']}, as in training" if tokens > facts["length"] else ""
    return f"{shape}{rows} · favourites counted over {facts['source']}"
