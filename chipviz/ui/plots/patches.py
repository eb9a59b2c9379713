"""The patch view: a picture with each patch tinted by what a chip says there."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from chipviz.results.answers import PatchReading
from chipviz.ui.plots.theme import CLASS_COLOURS, LIGHT, Look

STRONGEST = 0.72
"""Opacity of a tint where a chip is sure: the picture stays to be seen."""


def patches_figure(
    answer: PatchReading, layer: int, slots: Sequence[int], *, look: Look = LIGHT
) -> go.Figure:
    """Draw what a layer's chip says at each patch: colour is class, strength confidence.

    Args:
        answer: Of one picture.
        layer: Whose chip.
        slots: Place of each class in `CLASS_COLOURS`.
        look: The page's theme.
    """
    rows, columns = answer.grid
    labels, shares = answer.label_index[layer], answer.confidence[layer]
    tints = [_tint(slots[label], share) for label, share in zip(labels, shares, strict=True)]
    said = [
        f"{html.escape(answer.label_names[label][:60])}<br>{100 * share:.0f} %"
        for label, share in zip(labels, shares, strict=True)
    ]
    figure = go.Figure(
        go.Image(
            z=[tints[row * columns : (row + 1) * columns] for row in range(rows)],
            colormodel="rgba",
            customdata=[
                [[text] for text in said[row * columns : (row + 1) * columns]]
                for row in range(rows)
            ],
            hovertemplate="row %{y}, column %{x}<br>%{customdata[0]}<extra></extra>",
        )
    )
    figure.add_layout_image(
        source=f"data:image/png;base64,{answer.seen}",
        xref="x",
        yref="y",
        x=-0.5,
        y=-0.5,
        sizex=columns,
        sizey=rows,
        sizing="stretch",
        layer="below",
    )
    side = 470
    figure.update_layout(
        height=round(side * rows / columns) + 8,
        margin={"l": 0, "r": 0, "t": 4, "b": 4},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": look.text},
        dragmode=False,
    )
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5], fixedrange=True)
    figure.update_yaxes(
        visible=False, range=[rows - 0.5, -0.5], fixedrange=True, scaleanchor="x", scaleratio=1
    )
    return figure


def _tint(slot: int, share: float) -> list[float]:
    colour = CLASS_COLOURS[slot].lstrip("#")
    red, green, blue = (int(colour[i : i + 2], 16) for i in (0, 2, 4))
    return [red, green, blue, round(STRONGEST * share, 3)]
