"""The routing explorer in a notebook: type a text, move through layers and experts. Without a kernel the layers move."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ipywidgets

from sigma_lite.config import ConfigError
from sigma_lite.serve.explore import experts, facts
from sigma_lite.serve.marked import at_hand
from sigma_lite.serve.trained import Trained
from sigma_lite.teach.explore import Explore
from sigma_lite.teach.plots_routing import BUSIEST, routed_text


class RoutingExplorer(ipywidgets.VBox):
    """A text box above the text, coloured by expert. `sigma-lite explore` writes the same as a page in which one can click.

    Args:
        run: a run's folder, or what `Trained` returns for it.
        text: to begin with.
        tokens: of held-out text (or of this Python's library, where that is not at hand) by which experts are known.
    """

    def __init__(self, run: str | Path | Trained, text: str, tokens: int = 20_000):
        self._trained = run if isinstance(run, Trained) else Trained(run)
        marked = at_hand(self._trained, None, tokens)
        self._known, self._source = experts(self._trained, marked), marked.source
        box = {"width": "min(720px, 98%)", "height": "90px"}
        self.text = ipywidgets.Textarea(text, continuous_update=False, description="text", layout=box)
        self.problem = ipywidgets.Label()
        self.explore = self._explore(text)
        self.text.observe(lambda change: self._read(change["new"]), "value")
        super().__init__([self.text, self.problem, self.explore])

    def _explore(self, text: str) -> Explore:
        found = facts(self._trained, text, self._known, self._source)
        choices = {"expert": [BUSIEST, *range(len(self._known[0]))]}
        return Explore(partial(routed_text, found), "layer", range(len(found["experts"])), also=choices)

    def _read(self, text: str) -> None:
        """Another text: the layer and the expert stay."""
        try:
            explore = self._explore(text)
        except ConfigError as error:
            self.problem.value = str(error)
            return
        for slider, before in zip(explore.sliders, self.explore.sliders, strict=True):
            slider.value = before.value
        self.problem.value, self.explore = "", explore
        self.children = [self.text, self.problem, explore]

    def _repr_mimebundle_(self, **kwargs) -> dict:
        own = super()._repr_mimebundle_(**kwargs)
        own = own[0] if isinstance(own, tuple) else own
        return self.explore._repr_mimebundle_() | own | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"RoutingExplorer({len(self._known)} layers of {len(self._known[0])} experts, known by {self._source})"
