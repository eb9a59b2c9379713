"""Compared runs -> plotly: test accuracy against parameters, latency or bytes."""

from collections.abc import Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from chipviz.keys import Cut
from chipviz.results.compare import Compared, Row
from chipviz.ui.plots.theme import CLASS_COLOURS, LIGHT, Look, frame, mix_white, rgba, safe, title

Axis = Literal["parameters", "latency", "bytes"]
"""What a model keeps, on the horizontal axis."""
_UNITS: dict[Axis, tuple[float, str]] = {
    "parameters": (1e6, "parameters, millions"),
    "latency": (1e-3, "latency of one text, ms"),
    "bytes": (1e6, "weights, MB"),
}
COLOURS = tuple(CLASS_COLOURS[i] for i in (4, 5, 2, 6, 0, 1, 7))
"""One a run, in the order of the address. Yellow is left out: a line of it cannot be seen."""


def comparison_figure(
    runs: Sequence[Compared], rows: Sequence[Row], *, axis: Axis = "parameters", look: Look = LIGHT
) -> go.Figure:
    """Draw one curve a run over its layers, a star where it is cut, a hollow mark for the model.

    Args:
        runs: What is compared.
        rows: Their rows, as `compare` gives them.
        axis: What is on the horizontal axis.
        look: Colours of the theme.
    """
    unit, words = _UNITS[axis]
    figure, values = go.Figure(), list[float]()
    for i, run in enumerate(runs):
        colour = mix_white(COLOURS[i % len(COLOURS)], look.lift)
        name = safe(f"{run.report.backbone.name}: {run.method}")
        own = [row for row in rows if row.run_id == run.report.run_id]
        key = next(row for row in own if row.mark == "cut")
        chip = next(
            s.key for s in run.report.scores if f"{s.key.vector.name} {s.key.word}" == key.chip
        )
        scores = sorted(
            (s for s in run.report.scores if s.key == chip and s.split == "test" and s.layer >= 0),
            key=lambda s: s.layer,
        )
        costs = [run.report.cost_at(Cut(s.layer, chip)) for s in scores]
        xs = [_amount(axis, cost.n_parameters, cost.latency_s, cost.weight_bytes) for cost in costs]
        values += [100 * s.accuracy for s in scores]
        figure.add_trace(
            go.Scatter(
                x=[None if x is None else x / unit for x in xs],
                y=[100 * s.accuracy for s in scores],
                mode="lines+markers",
                marker={"size": 4},
                line={"color": rgba(colour, 0.65), "width": 1.5},
                name=name,
                customdata=[s.layer for s in scores],
                hovertemplate=f"{name}<br>layer %{{customdata}}: %{{y:.1f}} %<extra></extra>",
            )
        )
        for row in own:
            figure.add_trace(_mark(row, axis, unit, colour, name))
            values += [100 * row.accuracy_low, 100 * row.accuracy_high]
    _front(figure, rows, axis, unit, look)
    low = max(0.0, 10 * ((min(values) - 2) // 10))
    frame(figure, look, n_layers=None, y_range=(low, 101.5))
    figure.update_xaxes(title_text=words, rangemode="tozero")
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"r": 24, "b": 96},
    )
    n = rows[0].n
    title(
        figure,
        f"What is kept, and what it reaches: {safe(runs[0].report.task.name)}",
        f"test, n = {n:,}; 95 % intervals; star: cut, circle: last layer, hollow: without a chip",
        look,
    )
    return figure


def _amount(axis: Axis, n_parameters: int, latency_s: float | None, n_bytes: int) -> float | None:
    amounts: dict[Axis, float | None] = {
        "parameters": n_parameters,
        "latency": latency_s,
        "bytes": n_bytes,
    }
    return amounts[axis]


def _of(row: Row, axis: Axis) -> float | None:
    return _amount(axis, row.n_parameters, row.latency_s, row.weight_bytes)


def _mark(row: Row, axis: Axis, unit: float, colour: str, name: str) -> go.Scatter:
    symbols = {"cut": "star", "whole": "circle", "itself": "circle-open"}
    x = _of(row, axis)
    bars: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (row.accuracy_high - row.accuracy)],
        "arrayminus": [100 * (row.accuracy - row.accuracy_low)],
        "thickness": 1,
        "width": 3,
    }
    return go.Scatter(
        x=[None if x is None else x / unit],
        y=[100 * row.accuracy],
        mode="markers",
        marker={
            "size": 15 if row.mark == "cut" else 10,
            "color": colour,
            "symbol": symbols[row.mark],
        },
        error_y=bars | {"color": rgba(colour, 0.5)},
        showlegend=False,
        hovertemplate=f"{name}<br>{safe(row.method)}: %{{y:.1f}} %<extra></extra>",
    )


def _front(figure: go.Figure, rows: Sequence[Row], axis: Axis, unit: float, look: Look) -> None:
    """The line through rows that no other row beats in both directions."""
    known = sorted(
        ((x, row) for row in rows if (x := _of(row, axis)) is not None), key=lambda pair: pair[0]
    )
    front: list[tuple[float, Row]] = []
    for x, row in known:
        if not front or row.accuracy > front[-1][1].accuracy:
            front.append((x, row))
    if len(front) > 1:
        figure.add_trace(
            go.Scatter(
                x=[x / unit for x, _ in front],
                y=[100 * row.accuracy for _, row in front],
                mode="lines",
                line={"color": look.muted, "width": 1, "dash": "dot", "shape": "hv"},
                name="none smaller is better",
                hoverinfo="skip",
            )
        )
