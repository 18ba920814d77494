"""Text, tables and figures as HTML. Whatever comes from a record passes through `escape` here, nowhere else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def preformatted(text: str, kind: str = "") -> str:
    return f'<pre class="{escape(kind)}" tabindex="0">{escape(text)}</pre>'


def fold(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


class Sorted(NamedTuple):
    """A cell that is written as `text` and sorted by `key`; NaN comes last."""

    text: str
    key: float


def table(head: Iterable[str], rows: Iterable[Iterable[object]], sortable: bool = False) -> str:
    """Rows under a head, whose numbers align to the right; without a head, rows of name and value.

    `sortable`: the page sorts the rows by the column whose head is chosen, by a cell's key where it is `Sorted`.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="wide" tabindex="0"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, Sorted):
        key = f' data-key="{value.key!r}"' if math.isfinite(value.key) else ' data-key=""'
        return f'<td class="number"{key}>{escape(value.text)}</td>'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
        return f'<td class="number">{escape(text)}</td>'
    return f"<td>{escape(value)}</td>"


def figure(fig: go.Figure, name: str, number: int, caption: str) -> str:
    """A figure with its title and caption as text, so that they wrap on a phone, and its data as JSON beside it."""
    title, subtitle = fig.layout.title.text or "", fig.layout.title.subtitle.text or ""
    if not fig.data:
        why = fig.layout.annotations[0].text if fig.layout.annotations else "nothing to draw"
        return f'<p class="absent"><b>{escape(title)}</b>: {escape(why)}.</p>'
    head = f'<h3 class="title">{escape(title)}</h3>' + (f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else "")
    place = f'<div class="plot" data-figure="{escape(name)}" style="height:{int(fig.layout.height)}px" role="group"'
    drawing = f'{place} aria-label="{escape(title)}"></div>'
    below = f"<figcaption><b>Figure {number}.</b> {escape(caption)}</figcaption>" if caption else ""
    return f'<figure id="fig-{escape(name)}">{head}{drawing}{below}{data(f"data-{name}", drawable(fig))}</figure>'


def data(name: str, content: object) -> str:
    """JSON inside the page. `<` is written as \\u003c, so that no text of a record can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def drawable(fig: go.Figure) -> dict:
    """The figure for plotly.js, without title and template: the page has its own."""
    content = fig.to_dict()
    layout = content["layout"]
    for key in ("template", "title"):
        layout.pop(key, None)
    layout["margin"] = {**layout.get("margin", {}), "t": 44}
    return plain(content)


def plain(value: object) -> object:
    """Numbers as JSON holds them (NaN becomes null), and packed arrays in 32 bits instead of 64."""
    if isinstance(value, dict) and value.get("dtype") == "f8":
        return _packed(np.frombuffer(base64.b64decode(value["bdata"]), "<f8"), value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _packed(numbers: np.ndarray, spec: dict) -> dict:
    whole = np.isfinite(numbers).all() and (numbers == np.round(numbers)).all() and (np.abs(numbers) < 2**31).all()
    dtype = "i4" if whole else "f4"
    return {**spec, "dtype": dtype, "bdata": base64.b64encode(numbers.astype(f"<{dtype}").tobytes()).decode()}


def script_hash(text: str) -> str:
    """What a Content-Security-Policy needs to allow exactly this script and no other."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
