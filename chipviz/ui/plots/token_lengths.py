"""Token counts of prompts -> plotly histogram."""

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go

from chipviz.ui.plots.theme import LIGHT, Look, frame, title


def lengths_figure(
    edges: Sequence[int], counts: Sequence[int], *, limit: int, subtitle: str, look: Look = LIGHT
) -> go.Figure:
    """Draw how many prompts have how many tokens. The limit is a line where it is in sight.

    Args:
        edges: Edges of the bins. Bin i holds lengths from edges[i] to below edges[i + 1].
        counts: Prompts in each bin, one fewer than edges.
        limit: Tokens a prompt may have.
        subtitle: What was counted. Already safe for plotly.
        look: Colours of the theme.
    """
    spans = list(pairwise(edges))
    figure = go.Figure(
        go.Bar(
            x=[(start + stop) / 2 for start, stop in spans],
            y=list(counts),
            width=[stop - start for start, stop in spans],
            marker={"color": look.accent, "line": {"color": look.paper, "width": 1}},
            customdata=[
                f"{start} tokens" if stop - start == 1 else f"{start} to {stop - 1} tokens"
                for start, stop in spans
            ],
            hovertemplate="%{customdata}: %{y:,} prompts<extra></extra>",
        )
    )
    frame(figure, look, n_layers=None, y_range=(0, 1.12 * max(counts)))
    figure.update_layout(height=280, margin={"l": 52, "r": 16, "t": 68, "b": 44}, bargap=0)
    figure.update_xaxes(title_text="tokens of a prompt", showgrid=False)
    figure.update_yaxes(title_text="prompts")
    if limit <= edges[-1]:
        figure.add_vline(x=limit + 0.5, line={"color": look.text, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=limit + 0.5,
            y=1,
            yref="paper",
            text=f"limit {limit:,}",
            showarrow=False,
            xanchor="right",
            xshift=-4,
            font={"color": look.text},
        )
    title(figure, "Lengths", subtitle, look)
    return figure
