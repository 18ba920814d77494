"""One figure, two faces: sliders that ask the kernel in JupyterLab, a slider inside the figure on a page without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import plotly.graph_objects as go

from sigma_lite.config import require

PLOTLY_MIME = "application/vnd.plotly.v1+json"
SLIDER_ROOM = 90  # pixels below the figure for the static face's slider


class Explore(ipywidgets.VBox):
    """Sliders above the figure that `draw` returns for their values.

    Args:
        draw: pure function of one value per slider -> plotly figure. It is called for every value of the first slider
            when the object is shown, so it should be quick. Traces and layout may differ from value to value; an axis
            without a range of its own rescales, so give a range where values are to be compared.
        name: what the first slider means; this one also moves on the static page.
        values: its positions.
        also: further sliders, {name: values}. Without a kernel they rest at their start.
        start: position of each slider by name, default the first value.
    """

    def __init__(
        self,
        draw: Callable[..., go.Figure],
        name: str,
        values: Sequence,
        also: Mapping[str, Sequence] | None = None,
        start: Mapping[str, object] | None = None,
    ):
        positions = {name: list(values), **{other: list(v) for other, v in (also or {}).items()}}
        start = {slider: choices[0] for slider, choices in positions.items()} | dict(start or {})
        for slider, value in start.items():
            require(slider in positions, f"start names {slider!r}; the sliders are {', '.join(positions)}")
            require(value in positions[slider], f"start {slider}={value!r} is not one of its values {positions[slider]}")
        self._draw, self._name, self._values, self._start = draw, name, positions[name], start
        self.sliders = [_slider(slider, choices, start[slider]) for slider, choices in positions.items()]
        self._out = ipywidgets.Output()
        for slider in self.sliders:
            slider.observe(lambda _: self._redraw(), "value")
        self._redraw()
        super().__init__([*self.sliders, self._out])

    def figure(self) -> go.Figure:
        """The figure at the sliders' present positions."""
        return self._draw(*(slider.value for slider in self.sliders))

    def _redraw(self) -> None:
        # Output.append_display_data would let plotly show the figure a second time, below the widget
        self._out.outputs = ({"output_type": "display_data", "metadata": {}, "data": _mime(self.figure())},)

    def static(self) -> go.Figure:
        """All values of the first slider in one figure, the other sliders at their start; needs no kernel."""
        rest = [value for slider, value in self._start.items() if slider != self._name]
        figures = [self._draw(value, *rest) for value in self._values]
        return _stack(figures, self._name, [str(v) for v in self._values], self._values.index(self._start[self._name]))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**bundle, **_mime(self.static()), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "Explore(" + ", ".join(f"{slider.description} = {slider.value}" for slider in self.sliders) + ")"


def _slider(name: str, values: list, start: object) -> ipywidgets.SelectionSlider:
    return ipywidgets.SelectionSlider(
        options=[(str(value), value) for value in values],
        value=start,
        description=name,
        style={"description_width": "initial"},
        layout={"width": "min(560px, 95%)"},
    )


def _mime(figure: go.Figure) -> dict:
    return {PLOTLY_MIME: figure.to_plotly_json()} if not figure.frames else {PLOTLY_MIME: figure.to_dict()}


def _stack(figures: list[go.Figure], name: str, labels: list[str], first: int) -> go.Figure:
    """Show one figure's traces at a time. Frames would need the same traces in each; this lets number and kind change."""
    stacked = go.Figure(layout=figures[first].layout)
    owner = [number for number, figure in enumerate(figures) for _ in figure.data]
    shown = [trace.visible if trace.visible is not None else True for figure in figures for trace in figure.data]
    for number, figure in enumerate(figures):
        for trace in figure.data:
            stacked.add_trace(trace)
            stacked.data[-1].visible = shown[len(stacked.data) - 1] if number == first else False
    steps = [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [v if own == number else False for own, v in zip(owner, shown, strict=True)]}, changes],
        }
        for number, (label, changes) in enumerate(zip(labels, _layout_changes(figures), strict=True))
    ]
    # the template's margin is not a property of the layout, hence the fallbacks
    bottom = stacked.layout.margin.b if stacked.layout.margin.b is not None else 50
    height = stacked.layout.height or 450
    stacked.update_layout(
        sliders=[{"active": first, "steps": steps, "currentvalue": {"prefix": name + " = "}, "pad": {"t": 50}}],
        height=height + SLIDER_ROOM,
        margin={"b": bottom + SLIDER_ROOM},
    )
    return stacked


def _layout_changes(figures: list[go.Figure]) -> list[dict]:
    """For each figure the layout keys that are not the same in all, dotted as Plotly.relayout wants them."""
    flat = [dict(_flatten(figure.to_plotly_json()["layout"])) for figure in figures]
    keys = {key for layout in flat for key in layout}
    varying = sorted(key for key in keys if any(layout.get(key) != flat[0].get(key) for layout in flat))
    return [{key: layout.get(key) for key in varying} for layout in flat]


def _flatten(layout: Mapping, prefix: str = ""):
    for key, value in layout.items():
        if prefix == "" and key in ("template", "height", "margin"):
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
