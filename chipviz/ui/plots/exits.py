"""What every threshold of early exits would give -> plotly Figure."""

from collections.abc import Sequence

import plotly.graph_objects as go

from chipviz.keys import Split
from chipviz.results.exits import ExitPlan
from chipviz.ui.plots.theme import LIGHT, Look, frame, title

Point = tuple[float, float, float]
"""Threshold, mean layers, accuracy."""


def exits_figure(
    plan: ExitPlan, curves: dict[Split, Sequence[Point]], *, look: Look = LIGHT
) -> go.Figure:
    """Draw accuracy against the layers that a text runs through, and mark what is chosen.

    Args:
        plan: What is chosen.
        curves: By split: every threshold's mean layers and accuracy.
        look: Colours of the theme.
    """
    figure = go.Figure()
    colours: dict[Split, str] = {"validation": look.muted, "test": look.accent}
    values: list[float] = []
    for split, points in curves.items():
        values += [accuracy for _, _, accuracy in points]
        figure.add_trace(
            go.Scatter(
                x=[layers for _, layers, _ in points],
                y=[100 * accuracy for _, _, accuracy in points],
                mode="lines",
                line={"color": colours[split], "width": 2.5 if split == "test" else 1.5},
                name=split,
                hovertemplate="%{x:.1f} layers: %{y:.1f} %<extra>" + split + "</extra>",
            )
        )
    test = plan.test
    figure.add_trace(
        go.Scatter(
            x=[test.mean_layers],
            y=[100 * test.accuracy],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [100 * (test.accuracy_high - test.accuracy)],
                "arrayminus": [100 * (test.accuracy - test.accuracy_low)],
                "color": look.accent,
            },
            mode="markers",
            marker={"color": look.accent, "size": 12, "symbol": "star"},
            name="chosen",
            hovertemplate="%{x:.1f} layers: %{y:.1f} %<extra>chosen, test</extra>",
        )
    )
    values += [test.accuracy_low, test.accuracy_high]
    low, high = 100 * min(values), 100 * max(values)
    room = 0.08 * (high - low) or 1.0
    frame(figure, look, n_layers=None, y_range=(max(0.0, low - room), min(101.0, high + room)))
    figure.update_layout(
        height=340,
        margin={"l": 52, "r": 16, "t": 72, "b": 96},
        showlegend=True,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.34, "yanchor": "top"},
    )
    figure.update_xaxes(title={"text": "layers a text runs through, mean", "standoff": 8})
    title(figure, "Early exits", "each point is a threshold", look)
    return figure
