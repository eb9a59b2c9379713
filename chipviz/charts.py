"""Score table -> plotly Figure; pure functions that know neither files nor the page.

Colours, washes and labels follow one visual language: a series keeps its colour everywhere, the
cut is the one accent line, what lies beyond it is washed out because it is what gets removed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from chipviz.canvas import (
    BAND_OPACITY,
    CLASS_COLOURS,
    DASHES,
    LIGHT,
    MARKER_PX,
    SERIES,
    End,
    Look,
    class_scale,
    control_lines,
    cut_line,
    end_labels,
    frame,
    kept_axis,
    rgba,
    safe,
    short,
    title,
    wash,
)
from chipviz.config import ChipKind, Pooling, Split
from chipviz.metrics import CurvePoint, Score
from chipviz.report import RunReport

TOP = 101.5
"""Upper end of every accuracy axis, in %: markers at 100 stay whole."""
MAX_TICK_TOKENS = 48
"""Longer texts get no token labels under the map: they would only overlap."""


def curve_figure(
    report: RunReport,
    *,
    cut_layer: int,
    pooling: Pooling,
    split: Split = "validation",
    look: Look = LIGHT,
) -> go.Figure:
    """Draw accuracy over layers of every chip, its interval, the controls and the cut.

    Each point carries `customdata = [layer, pooling, chip]`, so a click names a cut.

    Args:
        report: A finished run.
        cut_layer: The last layer kept; everything right of it is washed out.
        pooling: The pooling of the chip at the cut; its point is ringed.
        split: Whose scores to draw.
        look: Colours of the page's theme.
    """
    layers = report.backbone.n_layers
    figure = go.Figure()
    ends: list[End] = []
    for series in _series(report.scores, split):
        figure.add_traces(_band_and_line(series, report, look))
        name = series[0].pooling
        ends.append(End(100 * series[-1].accuracy, _series_name(series[0]), look.series(name)))
    y_range = (_floor(report, split), TOP)
    kept = [100 * (1 - report.cost_at(layer, pooling).parameter_ratio) for layer in range(layers)]
    kept_axis(figure, kept, look)
    frame(figure, look, n_layers=layers, y_range=y_range)
    figure.update_layout(margin_t=116)
    ends += control_lines(figure, _control_values(report, split, pooling), look)
    end_labels(figure, ends, look, x=layers - 0.2, y_range=y_range)
    cut_line(figure, cut_layer, layers, look)
    at = report.score_at(cut_layer, pooling, "linear", split)
    _ring(figure, at, look)
    n = at.n
    title(
        figure,
        f"Accuracy of a chip on every layer: {safe(report.task.name)}",
        f"{split}, n = {n:,}, preset {report.preset}, 95 % interval shaded",
        look,
    )
    return figure


def live_figure(
    points: Sequence[CurvePoint], *, total: int | None = None, look: Look = LIGHT
) -> go.Figure:
    """Draw the newest state of a growing curve, with the state before it as a faint ghost.

    The axes depend only on the first state, so nothing jumps while the curve grows.

    Args:
        points: The history of a run, in any order; may be empty.
        total: Training texts the run will read, where it is known.
        look: Colours of the page's theme.
    """
    figure = go.Figure()
    steps = sorted({p.n_train for p in points})
    layers = 1 + max((p.layer for p in points), default=29)
    ends: list[End] = []
    for name in _poolings(points):
        own = [p for p in points if p.pooling == name and p.layer >= 0]
        for step in steps[-2:-1]:
            figure.add_trace(_live_line(own, step, name, look, ghost=True))
        line = _live_line(own, steps[-1], name, look, ghost=False)
        figure.add_trace(line)
        ends.append(End(_last(line), name, look.series(name)))
    first = [p.accuracy for p in points if steps and p.n_train == steps[0]]
    y_range = (_below(min(first, default=0.0)), TOP)
    frame(figure, look, n_layers=layers, y_range=y_range)
    end_labels(figure, ends, look, x=layers - 0.2, y_range=y_range)
    of = f" of {total:,}" if total else ""
    seen = f"after {steps[-1]:,}{of} texts" if steps else "waiting for the first texts"
    title(figure, "Accuracy of a chip on every layer, growing", f"validation, {seen}", look)
    return figure


def size_figure(
    report: RunReport,
    *,
    cut_layer: int,
    pooling: Pooling,
    split: Split = "validation",
    look: Look = LIGHT,
) -> go.Figure:
    """Draw accuracy against the share of parameters a cut keeps, in %."""
    figure = go.Figure()
    ends: list[End] = []
    for series in _series(report.scores, split):
        name = series[0].pooling
        costs = [report.cost_at(s.layer, name) for s in series]
        kept = [100 * (1 - c.parameter_ratio) for c in costs]
        figure.add_trace(
            go.Scatter(
                x=kept,
                y=[100 * s.accuracy for s in series],
                mode="lines+markers",
                name=_series_name(series[0]),
                line={"color": look.series(name), "dash": DASHES[series[0].chip]},
                marker={"size": MARKER_PX - 2},
                customdata=[[s.layer, name, s.chip] for s in series],
                text=[
                    f"layer {s.layer} - {name} - {100 * s.accuracy:.1f} % - "
                    f"{c.weight_bytes / 1e6:,.0f} MB"
                    for s, c in zip(series, costs, strict=True)
                ],
                hoverinfo="text",
            )
        )
        ends.append(End(100 * series[-1].accuracy, _series_name(series[0]), look.series(name)))
    y_range = (_floor(report, split), TOP)
    frame(figure, look, n_layers=None, y_range=y_range)
    figure.update_xaxes(title_text="parameters kept, %", range=[0, 102])
    end_labels(figure, ends, look, x=102, y_range=y_range)
    cost = report.cost_at(cut_layer, pooling)
    at = report.score_at(cut_layer, pooling, "linear", split)
    figure.add_vline(x=100 * (1 - cost.parameter_ratio), line_color=look.accent, line_width=2)
    _ring(figure, at, look, x=100 * (1 - cost.parameter_ratio))
    title(figure, "Accuracy against size", f"{split}, n = {at.n:,}; the line is the cut", look)
    return figure


def learning_figure(
    points: Sequence[CurvePoint], *, cut_layer: int, look: Look = LIGHT
) -> go.Figure:
    """Draw accuracy against training texts: at the cut in colour, at the last layer in grey."""
    figure = go.Figure()
    last = max((p.layer for p in points), default=0)
    for name in _poolings(points):
        for layer in dict.fromkeys((last, cut_layer)):
            own = sorted(
                (p for p in points if (p.pooling, p.layer) == (name, layer)),
                key=lambda p: p.n_train,
            )
            here = layer == cut_layer
            figure.add_trace(
                go.Scatter(
                    x=[p.n_train for p in own],
                    y=[100 * p.accuracy for p in own],
                    mode="lines+markers",
                    name=f"{name}, layer {layer}",
                    line={"color": look.series(name), "width": 2.5 if here else 1},
                    opacity=1 if here else 0.4,
                    marker={"size": MARKER_PX if here else 4},
                    hovertemplate="%{x:,} texts: %{y:.1f} %<extra>%{fullData.name}</extra>",
                )
            )
    low = _below(min((p.accuracy for p in points), default=0.0))
    frame(figure, look, n_layers=None, y_range=(low, TOP))
    figure.update_xaxes(title_text="training texts", rangemode="tozero")
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.22, "font": {"color": look.text}}
    )
    title(
        figure,
        "How many texts the chip needs",
        f"validation; strong: layer {cut_layer} (the cut), faint: layer {last} (the last)",
        look,
    )
    return figure


def confusion_figure(
    counts: NDArray[np.int64], label_names: Sequence[str], *, subtitle: str, look: Look = LIGHT
) -> go.Figure:
    """Draw counts of (true class, predicted class), shape (C, C); the diagonal is right."""
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


def class_slots(n_classes: int, *, answer: int, truth: int | None) -> list[int]:
    """Place of each class in `CLASS_COLOURS`.

    Up to eight classes have a colour each. More cannot be told apart: then the true class is
    green, a wrong answer vermilion, everything else grey; with no truth known the answer is green.
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
        cut_layer: The last layer kept; layers above are washed out.
        slots: Colour of each class, from `class_slots`.
        look: Colours of the page's theme.
    """
    classes = np.asarray(label_index)
    strength = np.clip(np.asarray(confidence, dtype=float), 0.0, 0.999)
    shown = [short(token, 14) for token in tokens]
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
    title(
        figure,
        "What every layer says at every token",
        f"strength is confidence; what is above the line goes (cut {cut_layer})",
        look,
    )
    return figure


def picked(points: Sequence[Any]) -> tuple[int, Pooling] | None:
    """The layer and pooling of a clicked point; None for an empty or foreign selection."""
    for point in points:
        data = point.get("customdata") or []
        if len(data) >= 2 and data[1] in SERIES:
            return int(data[0]), data[1]
    return None


def _series(scores: Sequence[Score], split: Split) -> list[list[Score]]:
    """The scores of one split, one list a (pooling, chip), each ordered by layer."""
    groups: dict[tuple[Pooling, ChipKind], list[Score]] = {}
    for score in scores:
        if score.split == split and score.layer >= 0:
            groups.setdefault((score.pooling, score.chip), []).append(score)
    return [sorted(group, key=lambda s: s.layer) for group in groups.values()]


def _poolings(points: Sequence[CurvePoint]) -> list[Pooling]:
    return [name for name in SERIES if any(p.pooling == name for p in points)]


def _series_name(score: Score) -> str:
    return score.pooling if score.chip == "linear" else f"{score.pooling}, {score.chip}"


def _band_and_line(series: Sequence[Score], report: RunReport, look: Look) -> list[go.Scatter]:
    pooling, chip = series[0].pooling, series[0].chip
    colour = look.series(pooling)
    layers = [s.layer for s in series]
    band = go.Scatter(
        x=[*layers, *reversed(layers)],
        y=[
            *(100 * s.accuracy_high for s in series),
            *(100 * s.accuracy_low for s in reversed(series)),
        ],
        fill="toself",
        fillcolor=rgba(colour, BAND_OPACITY),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name=f"{_series_name(series[0])}, 95 % interval",
    )
    line = go.Scatter(
        x=layers,
        y=[100 * s.accuracy for s in series],
        mode="lines+markers",
        name=_series_name(series[0]),
        line={"color": colour, "width": 2, "dash": DASHES[chip]},
        marker={"size": MARKER_PX, "color": colour},
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        customdata=[[s.layer, s.pooling, s.chip] for s in series],
        text=[_hover(s, report) for s in series],
        hoverinfo="text",
    )
    return [band, line]


def _hover(score: Score, report: RunReport) -> str:
    kept = 100 * (1 - report.cost_at(score.layer, score.pooling).parameter_ratio)
    return (
        f"layer {score.layer} - {score.pooling}, {score.chip} - {100 * score.accuracy:.1f} % "
        f"({100 * score.accuracy_low:.1f}-{100 * score.accuracy_high:.1f}, n = {score.n:,}) - "
        f"keeps {kept:.0f} %"
    )


def _live_line(
    points: Sequence[CurvePoint], step: int, pooling: Pooling, look: Look, *, ghost: bool
) -> go.Scatter:
    own = sorted((p for p in points if p.n_train == step), key=lambda p: p.layer)
    return go.Scatter(
        x=[p.layer for p in own],
        y=[100 * p.accuracy for p in own],
        mode="lines" if ghost else "lines+markers",
        name=f"{pooling}, after {step:,} texts",
        line={"color": look.series(pooling), "width": 1.5 if ghost else 2},
        opacity=0.25 if ghost else 1.0,
        marker={"size": MARKER_PX},
        hoverinfo="skip" if ghost else None,
        hovertemplate=None if ghost else "layer %{x}: %{y:.1f} %<extra>" + pooling + "</extra>",
    )


def _last(line: go.Scatter) -> float:
    return float(list(line.y)[-1]) if line.y else 0.0


def _floor(report: RunReport, split: Split) -> float:
    """Lower end of the y axis, in %: under chance and under everything that is drawn."""
    drawn = [s.accuracy for s in report.scores if s.split == split]
    controls = report.controls if split == "test" else report.controls_validation
    return _below(min([*drawn, controls.majority, 1 / report.task.n_classes]))


def _below(accuracy: float) -> float:
    """The multiple of ten (in %) at least three points under `accuracy`."""
    return max(0.0, 10 * np.floor((100 * accuracy - 3) / 10))


def _control_values(report: RunReport, split: Split, pooling: Pooling) -> dict[str, float]:
    controls = report.controls if split == "test" else report.controls_validation
    last = report.score_at(report.backbone.n_layers - 1, pooling, "linear", split)
    return {
        "majority": controls.majority,
        "embedding": controls.embedding,
        "TF-IDF": controls.tfidf,
        "last layer": last.accuracy,
    }


def _ring(figure: go.Figure, score: Score, look: Look, x: float | None = None) -> None:
    figure.add_trace(
        go.Scatter(
            x=[score.layer if x is None else x],
            y=[100 * score.accuracy],
            mode="markers",
            marker={
                "size": MARKER_PX + 6,
                "symbol": "circle-open",
                "color": look.accent,
                "line": {"width": 2.5},
            },
            hoverinfo="skip",
            name="the cut",
        )
    )
