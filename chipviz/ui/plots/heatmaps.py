"""Counts and classes -> plotly heat maps: confusion at the cut, classes by token and layer.

Pure functions that know neither files nor the page.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from chipviz.ui.plots.theme import (
    CLASS_COLOURS,
    LIGHT,
    Look,
    class_scale,
    frame,
    short,
    title,
    wash,
)

MAX_CLASSES = 50
"""Classes up to which every one has a row and a column of its own."""
MAX_CELLS = 10_000
"""Cells of a map of tokens and layers. Each has words to hover over: more take seconds to send."""
MAX_TICK_TOKENS = 48
"""Longer texts get no token labels under the map: they would only overlap."""


def confusion_figure(
    counts: NDArray[np.int64], label_names: Sequence[str], *, subtitle: str, look: Look = LIGHT
) -> go.Figure:
    """Draw counts of (true class, predicted class), shape (C, C). The diagonal is right."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [short(name, 24) for name in label_names]
    places = list(range(len(names)))
    figure = go.Figure(
        go.Heatmap(
            z=share,
            x=places,
            y=places,
            text=counts,
            texttemplate="%{text}" if len(names) <= 20 else None,
            colorscale=[[0, look.paper], [1, look.accent]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=2,
            ygap=2,
            customdata=[[f"{row} read as {column}" for column in names] for row in names],
            hovertemplate="%{customdata}: %{text}<extra></extra>",
        )
    )
    frame(figure, look, n_layers=None, y_range=(len(names) - 0.5, -0.5))
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": names, "showgrid": False}
    figure.update_xaxes(title_text="the chip says", **ticks)
    figure.update_yaxes(title_text="true class", automargin=True, **ticks)
    figure.update_layout(height=max(360, 34 * len(names) + 160), margin_r=20)
    title(figure, "Confusion at the cut", subtitle, look)
    return figure


def coarse_confusion_figure(
    counts: NDArray[np.int64], label_names: Sequence[str], *, subtitle: str, look: Look = LIGHT
) -> go.Figure:
    """Draw counts of (true class, predicted class), shape (C, C), neighbouring classes as one.

    So many classes cannot be told apart; what stays visible is whether they lie on the diagonal.
    """
    edges: list[int] = np.linspace(0, len(counts), MAX_CLASSES + 1).astype(int).tolist()[:-1]
    coarse = np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)
    ends = [*edges[1:], len(counts)]
    names = [
        f"{short(label_names[first], 16)} to {short(label_names[end - 1], 16)}"
        for first, end in zip(edges, ends, strict=True)
    ]
    subtitle = f"{subtitle}; {len(counts):,} classes in {MAX_CLASSES} rows, neighbours together"
    figure = confusion_figure(coarse, names, subtitle=subtitle, look=look)
    figure.update_xaxes(tickvals=[], ticktext=[])
    figure.update_yaxes(tickvals=[], ticktext=[])
    figure.update_layout(height=560)
    return figure


def class_slots(n_classes: int, *, answer: int, truth: int | None) -> list[int]:
    """Place of each class in `CLASS_COLOURS`.

    Up to eight classes have a colour each. More cannot be told apart: then the true class is
    green, a wrong answer vermilion, everything else grey. With no truth known the answer is green.
    """
    if n_classes <= len(CLASS_COLOURS):
        return list(range(n_classes))
    slots = [7] * n_classes
    slots[answer] = 2 if truth in (None, answer) else 5
    if truth is not None:
        slots[truth] = 2
    return slots


def token_map_figure(
    tokens: Sequence[str],
    label_index: Sequence[Sequence[int]],
    confidence: Sequence[Sequence[float]],
    label_names: Sequence[str],
    *,
    cut_layer: int,
    slots: Sequence[int],
    look: Look = LIGHT,
) -> go.Figure:
    """Draw the class each layer's chip says at each token: colour is class, strength confidence.

    Args:
        tokens: Token texts, shape (T,).
        label_index: Class per layer and token, shape (L, T).
        confidence: Its probability, in [0, 1], shape (L, T).
        label_names: Class names, shape (C,).
        cut_layer: The last layer kept. Layers above are washed out.
        slots: Colour of each class, from `class_slots`.
        look: Colours of the page's theme.

    Only the first tokens of a very long text are drawn, `MAX_CELLS` over all layers.
    """
    n_drawn = max(1, MAX_CELLS // len(label_index))
    classes = np.asarray([row[:n_drawn] for row in label_index])
    strength = np.clip(np.asarray([row[:n_drawn] for row in confidence], dtype=float), 0.0, 0.999)
    shown = [short(token, 14) for token in tokens[:n_drawn]]
    names = [short(name, 40) for name in label_names]
    layers, n_tokens = classes.shape
    hover = [
        [
            f"layer {layer} - {shown[t]} - {names[classes[layer, t]]} "
            f"{100 * strength[layer, t]:.0f} %"
            for t in range(n_tokens)
        ]
        for layer in range(layers)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=np.asarray(slots)[classes] + strength,
            colorscale=class_scale(),
            zmin=0,
            zmax=len(CLASS_COLOURS),
            showscale=False,
            xgap=1,
            ygap=1,
            text=hover,
            hoverinfo="text",
        )
    )
    frame(figure, look, n_layers=None, y_range=(-0.5, layers - 0.5))
    few = n_tokens <= MAX_TICK_TOKENS
    figure.update_xaxes(
        title_text="token",
        showgrid=False,
        tickmode="array",
        tickvals=list(range(n_tokens)) if few else [],
        ticktext=shown if few else [],
        tickangle=-60,
    )
    figure.update_yaxes(title_text="layer", showgrid=False)
    figure.update_layout(height=480, margin={"t": 70, "r": 20, "b": 90})
    wash(figure, look, y0=cut_layer + 0.5, y1=layers - 0.5)
    figure.add_hline(y=cut_layer + 0.5, line_color=look.accent, line_width=2)
    few_of = f"the first {n_tokens:,} of {len(tokens):,} tokens; " if n_tokens < len(tokens) else ""
    title(
        figure,
        "What every layer says at every token",
        f"{few_of}strength is confidence; what is above the line goes (cut {cut_layer})",
        look,
    )
    return figure
