"""Ask the reader first. A guess on record is what makes a surprise out of a number."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakSet

import ipywidgets

from sigma_lite.storage import StorageError, write_json
from sigma_lite.teach.session import folder

GUESSES = "SIGMA_GUESSES"  # environment variable: the file of the reader's choices; empty: none, as where the book is built
_kept: dict[str, str] = {}  # question -> the reader's choice, so that Run All asks nobody twice
_shown: WeakSet[Comparison] = WeakSet()  # where a guess stands beside what was measured


def _guesses() -> dict[str, str]:
    """What the reader chose in this kernel and in earlier ones."""
    try:
        return {**json.loads(Path(_file()).read_text("utf-8")), **_kept}
    except (OSError, ValueError, TypeError):  # no file yet, or one that was damaged: a guess is no great loss
        return _kept


def _keep(key: str, choice: str) -> None:
    _kept[key] = choice
    for comparison in _shown:
        if comparison.prediction.key == key:
            comparison.value = comparison.says(choice)
    if _file():
        with contextlib.suppress(OSError, StorageError):  # a folder that cannot be written: the kernel still knows
            write_json(_file(), _guesses())


def _file() -> str:
    return os.environ.get(GUESSES, folder("guesses.json"))


class Prediction(ipywidgets.VBox):
    """A question with radio buttons. The choice is kept in `.guess` (text, or None before the reader chose), also when the
    cell is run again, and in another kernel on another day."""

    def __init__(self, question: str, options: Sequence[str]):
        self.question, self.options = question, [str(option) for option in options]
        self.key = "sigma_lite-guess-" + hashlib.sha256(question.encode()).hexdigest()[:10]
        before = _guesses().get(self.key)
        self._radio = ipywidgets.RadioButtons(
            options=self.options, value=before if before in self.options else None, layout={"width": "max-content"}
        )
        self._radio.observe(lambda change: _keep(self.key, change["new"]), "value")
        super().__init__([ipywidgets.HTML(f"<b>Predict:</b> {html.escape(question)}"), self._radio])

    @property
    def guess(self) -> str | None:
        return self._radio.value

    def compare(self, measured: str) -> Comparison:
        """Beside each other: what the reader said and what was measured."""
        return Comparison(self, measured)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**bundle, "text/html": self._static(), "text/plain": f"Predict: {self.question} {self.options}"}

    def _static(self) -> str:
        """Radio buttons for a page without a kernel; the book's script keeps the choice in the browser's own storage."""
        buttons = "".join(
            f'<label style="display:block"><input type="radio" name="{self.key}" value="{html.escape(option)}">'
            f" {html.escape(option)}</label>"
            for option in self.options
        )
        title = f"<legend><b>Predict:</b> {html.escape(self.question)}</legend>"
        return f'<fieldset class="sigma-predict" id="{self.key}">{title}{buttons}</fieldset>'


class Comparison(ipywidgets.HTML):
    """Follows the radio buttons: who guesses late, or again, sees it here at once."""

    def __init__(self, prediction: Prediction, measured: str):
        self.prediction, self.measured = prediction, measured
        super().__init__(self.says(prediction.guess))
        _shown.add(self)

    def says(self, guess: str | None) -> str:
        mine = f'<b data-sigma-guess="{self.prediction.key}">{html.escape(guess or "none yet")}</b>'
        return f"your guess: {mine} · measured: <b>{html.escape(self.measured)}</b>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**bundle, "text/html": self.value, "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"your guess: {self.prediction.guess or 'none yet'} · measured: {self.measured}"


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Radio buttons under a question; show the object, and later `.compare("what was measured")` under the result."""
    return Prediction(question, options)
