"""Ask the reader first. A guess on record is what makes a surprise out of a number."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence

import ipywidgets

_kept: dict[str, str] = {}  # question -> the reader's choice, so that Run All asks nobody twice; of this kernel


class Prediction(ipywidgets.VBox):
    """A question with radio buttons. The choice is kept in `.guess` (text, or None before the reader chose), also when the
    cell is run again."""

    def __init__(self, question: str, options: Sequence[str]):
        self.question, self.options = question, [str(option) for option in options]
        self.key = "sigma_lite-guess-" + hashlib.sha256(question.encode()).hexdigest()[:10]
        before = _kept.get(self.key)
        self._radio = ipywidgets.RadioButtons(
            options=self.options, value=before if before in self.options else None, layout={"width": "max-content"}
        )
        self._radio.observe(lambda change: _kept.__setitem__(self.key, change["new"]), "value")
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


class Comparison:
    def __init__(self, prediction: Prediction, measured: str):
        self.prediction, self.measured = prediction, measured

    def __repr__(self) -> str:
        return f"your guess: {self.prediction.guess or 'none yet'} · measured: {self.measured}"

    def _repr_html_(self) -> str:
        guess = html.escape(self.prediction.guess or "none yet")
        mine = f'<b data-sigma-guess="{self.prediction.key}">{guess}</b>'
        return f"your guess: {mine} · measured: <b>{html.escape(self.measured)}</b>"


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Radio buttons under a question; show the object, and later `.compare("what was measured")` under the result."""
    return Prediction(question, options)
