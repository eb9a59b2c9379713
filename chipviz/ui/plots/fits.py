"""Losses of a fit -> plotly Figure."""

from collections.abc import Sequence

import plotly.graph_objects as go

from chipviz.results.models import Mark
from chipviz.ui.plots.theme import LIGHT, Look, frame, title

MOST_POINTS = 400
"""Maximum points of a curve. Of more, means of neighbours are drawn."""


def fit_figure(marks: Sequence[Mark], *, look: Look = LIGHT) -> go.Figure:
    """Draw the loss of each step faintly and that of held-out texts in full.

    Args:
        marks: By name and step.
        look: Colours of the theme.
    """
    figure = go.Figure()
    colours = {"loss": look.muted, "validation": look.accent}
    names = {"loss": "each step", "validation": "held-out texts"}
    values: list[float] = []
    for name, colour in colours.items():
        own = _thinned([mark for mark in marks if mark.name == name])
        values += [value for _, value in own]
        if own:
            figure.add_trace(
                go.Scatter(
                    x=[n_tokens for n_tokens, _ in own],
                    y=[value for _, value in own],
                    mode="lines" if name == "loss" else "lines+markers",
                    line={"color": colour, "width": 1.5 if name == "loss" else 2.5},
                    name=names[name],
                    hovertemplate="%{x:,} tokens: %{y:.3f}<extra>" + names[name] + "</extra>",
                )
            )
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 0.1
    frame(figure, look, n_layers=None, y_range=(max(0.0, low - room), high + room))
    figure.update_layout(
        height=300, showlegend=True, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1}
    )
    figure.update_xaxes(title="tokens that the loss was on")
    figure.update_yaxes(title="loss of a token, nats", ticksuffix="")
    title(figure, "Loss", "lower is better", look)
    return figure


def _thinned(marks: Sequence[Mark]) -> list[tuple[int, float]]:
    """Tokens and loss of each point, neighbours joined."""
    step = -(-len(marks) // MOST_POINTS)
    groups = [marks[i : i + step] for i in range(0, len(marks), max(1, step))]
    return [(group[-1].n_tokens, sum(m.value for m in group) / len(group)) for group in groups]
