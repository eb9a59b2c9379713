"""What Sparsify-then-Classify found -> plotly: depth, what-which-where, single neurons."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from chipviz.keys import STC, STC_PUBLISHED, ChipKey, Pooling, Site
from chipviz.results.metrics import Score
from chipviz.results.neurons import Aggregate, Neuron
from chipviz.results.report import RunReport
from chipviz.ui.plots.theme import (
    BAND_OPACITY,
    CLASS_COLOURS,
    LIGHT,
    End,
    Look,
    chip_name,
    end_labels,
    frame,
    rgba,
    safe,
    short,
    title,
)

SYMBOLS: dict[Pooling, str] = {
    "last": "circle",
    "mean": "square",
    "first": "triangle-up",
    "max": "diamond",
}


def depth_figure(report: RunReport, joined: ChipKey, *, look: Look = LIGHT) -> go.Figure:
    """Draw accuracy over depth: one layer's sparse chip against all layers up to it joined.

    Args:
        report: A finished run.
        joined: Which curve. That of site *all* has no chip of one layer.
        look: Colours of the theme.

    Source: arXiv:2311.15983, figure 2.
    """
    n_layers, vector = report.backbone.n_layers, joined.vector
    one = ChipKey.sparse(vector, "published" if joined.by_paper else "sound")
    keys = [
        (joined, look.accent, "joined"),
        (_other(joined), look.ink(vector), "joined, sound" if joined.by_paper else "as published"),
        (one, look.series(vector), "one layer, L1"),
        (ChipKey.sound(vector.pooling), look.muted, "one layer, linear"),
    ]
    figure, ends, values = go.Figure(), [], [100.0]
    for key, colour, name in keys:
        scores = sorted(
            (s for s in report.scores if s.key == key and s.split == "test" and s.layer >= 0),
            key=lambda s: s.layer,
        )
        if not scores:
            continue
        strong = key == joined
        if strong:
            figure.add_trace(_band(scores, colour))
        figure.add_trace(
            go.Scatter(
                x=[s.layer for s in scores],
                y=[100 * s.accuracy for s in scores],
                mode="lines+markers" if strong else "lines",
                line={"color": colour, "width": 2.5 if strong else 1.5},
                marker={"size": 6},
                name=name,
                hovertemplate="layer %{x}: %{y:.1f} %<extra>" + name + "</extra>",
            )
        )
        ends.append(End(100 * scores[-1].accuracy, name, colour, bold=strong))
        values += [100 * s.accuracy_low if strong else 100 * s.accuracy for s in scores]
    y_range = (max(0.0, 10 * ((min(values) - 3) // 10)), 101.5)
    frame(figure, look, n_layers=n_layers, y_range=y_range)
    figure.update_layout(height=420)
    end_labels(figure, ends, x=n_layers - 0.2, y_range=y_range)
    n = next(s.n for s in report.scores if s.split == "test")
    words = f"test, n = {n:,}; 95 % interval of the joined ones shaded"
    title(figure, f"Depth: {safe(chip_name(joined))}", words, look)
    return figure


def _other(joined: ChipKey) -> ChipKey:
    """The same neurons joined by the other recipe. The paper's reads states before the norm."""
    if joined.by_paper:
        site: Site = "block" if joined.site == "raw" else joined.site
        return ChipKey(STC, site, joined.pooling, "sparse")
    site = "raw" if joined.site == "block" else joined.site
    return ChipKey(STC_PUBLISHED, site, joined.pooling, "sparse")


def _band(scores: Sequence[Score], colour: str) -> go.Scatter:
    layers = [s.layer for s in scores]
    high, low = [s.accuracy_high for s in scores], [s.accuracy_low for s in scores]
    return go.Scatter(
        x=[*layers, *reversed(layers)],
        y=[100 * value for value in (*high, *reversed(low))],
        fill="toself",
        fillcolor=rgba(colour, BAND_OPACITY),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name="95 % interval",
    )


def what_which_where(
    aggregates: Sequence[Aggregate], report: RunReport, *, look: Look = LIGHT
) -> go.Figure:
    """Draw how many neurons, of which depth, reach what: every classifier that was looked at.

    Above accuracy on validation, below depth, both over the number of neurons (log). Colour is
    depth, size eta, the symbol the pooling. Lines are the best chip of one layer and the last one.

    Source: arXiv:2311.15983, figure 3, which draws test points.
    """
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.06)
    shown = [a for a in aggregates if a.n_used and a.layer >= 0]
    n_layers = report.backbone.n_layers
    shapes: dict[Pooling, str] = {a.pooling: SYMBOLS[a.pooling] for a in shown}
    for pooling, shape in shapes.items():
        own = [a for a in shown if a.pooling == pooling]
        marker = {
            "color": [a.layer for a in own],
            "cmin": 0,
            "cmax": n_layers - 1,
            "colorscale": "Viridis",
            "size": [3 + 0.7 * (1e4 * a.eta) ** 0.32 for a in own],
            "symbol": shape,
            "line": {"width": 0.5, "color": look.paper},
        }
        words = [
            f"{a.site}, {a.pooling}: layers 0 to {a.layer}, eta {a.eta:g}, {a.n_used:,} neurons, "
            f"{100 * a.accuracy:.1f} %"
            for a in own
        ]
        bar = {"title": {"text": "depth"}, "thickness": 10, "len": 0.65, "y": 0.66}
        for row, y in ((1, [100 * a.accuracy for a in own]), (2, [a.layer for a in own])):
            figure.add_trace(
                go.Scatter(
                    x=[a.n_used for a in own],
                    y=y,
                    mode="markers",
                    marker=marker | ({"colorbar": bar} if row == 1 else {}),
                    text=words,
                    hoverinfo="text",
                    name=pooling,
                ),
                row=row,
                col=1,
            )
    single = [
        s
        for s in report.scores
        if s.split == "validation" and s.layer >= 0 and s.key.word == "linear"
    ]
    lines = {"best chip of one layer": max(s.accuracy for s in single)}
    last = [s.accuracy for s in single if s.layer == n_layers - 1]
    lines["last layer"] = max(last)
    values = [100 * a.accuracy for a in shown] + [100 * v for v in lines.values()]
    frame(figure, look, n_layers=None, y_range=(min(values) - 3, 101.5))
    sides = ("bottom left", "top right")
    for (name, value), side in zip(lines.items(), sides, strict=True):
        figure.add_hline(
            100 * value,
            line={"color": look.muted, "width": 1, "dash": "dot"},
            annotation={"text": name, "font": {"color": look.muted, "size": 12}},
            annotation_position=side,
            row=1,  # pyright: ignore[reportArgumentType]
            col=1,  # pyright: ignore[reportArgumentType]
        )
    figure.update_layout(height=560, margin={"r": 24, "b": 48})
    figure.update_xaxes(type="log", dtick=1)
    figure.update_xaxes(title_text="neurons with a weight", row=2, col=1)
    figure.update_yaxes(title_text="depth", range=[-1, n_layers], row=2, col=1)
    poolings = ", ".join(f"{shape} = {pooling}" for pooling, shape in shapes.items())
    words = f"validation; size: eta; {poolings}"
    title(figure, "What, which, where", words, look)
    return figure


def neuron_figure(neuron: Neuron, names: Sequence[str], *, look: Look = LIGHT) -> go.Figure:
    """Draw how the values of a neuron spread over the texts of each class.

    Of more classes than there are colours, those that the neuron parts most are drawn, and the rest
    together. Source: arXiv:2311.15983, figure 4a.
    """
    middles = [(a + b) / 2 for a, b in zip(neuron.edges, neuron.edges[1:], strict=False)]
    width = neuron.edges[1] - neuron.edges[0]
    most = len(CLASS_COLOURS) - 1
    order = sorted(range(len(names)), key=lambda c: -_mean(middles, neuron.counts[c]))
    drawn = order if len(names) <= most else [*order[: most // 2], *order[-(most - most // 2) :]]
    rest = [c for c in range(len(names)) if c not in drawn]
    figure = go.Figure()
    for i, c in enumerate(sorted(drawn)):
        figure.add_trace(_bars(middles, neuron.counts[c], width, CLASS_COLOURS[i], names[c]))
    if rest:
        counts = [sum(neuron.counts[c][b] for c in rest) for b in range(len(middles))]
        label = f"{len(rest)} other classes"
        figure.add_trace(_bars(middles, counts, width, CLASS_COLOURS[-1], label))
    highest = max(sum(row[b] for row in neuron.counts) for b in range(len(middles)))
    frame(figure, look, n_layers=None, y_range=(0, 1.1 * max(1, highest)))
    figure.update_layout(
        height=330,
        barmode="stack",
        bargap=0,
        showlegend=True,
        margin={"l": 44, "r": 12, "t": 70, "b": 76},
        legend={
            "orientation": "h",
            "y": -0.32,
            "yanchor": "top",
            "font": {"size": 12, "color": look.text},
        },
    )
    figure.update_xaxes(title_text="value", title_standoff=4, showgrid=False)
    figure.update_yaxes(title_text="texts")
    words = f"{100 * neuron.share:.0f} % of its layer's importance; validation texts"
    title(figure, f"Neuron {neuron.column} of layer {neuron.layer}", words, look)
    return figure


def _mean(middles: Sequence[float], counts: Sequence[int]) -> float:
    return sum(m * c for m, c in zip(middles, counts, strict=True)) / max(1, sum(counts))


def _bars(
    middles: Sequence[float], counts: Sequence[int], width: float, colour: str, name: str
) -> go.Bar:
    return go.Bar(
        x=list(middles),
        y=list(counts),
        width=width,
        marker={"color": colour},
        name=short(name, 24),
        hovertemplate="%{y} texts at %{x:.2f}<extra>%{fullData.name}</extra>",
    )
