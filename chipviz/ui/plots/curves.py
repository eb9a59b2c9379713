"""Score table -> plotly Figure. Pure functions that know neither files nor the page.

Colours, washes and labels follow one visual language: a vector keeps its colour everywhere and a
kind of chip its dash. The cut is the one accent line, what lies beyond it is washed out because it
is what gets removed.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import plotly.graph_objects as go

from chipviz.keys import ChipKey, Cut, Split, in_order
from chipviz.results.metrics import CurvePoint, Score
from chipviz.results.report import RunReport
from chipviz.ui.plots.theme import (
    BAND_OPACITY,
    DASHES,
    FITS_OPACITY,
    KINDS,
    LIGHT,
    MARKER_PX,
    SYMBOLS,
    End,
    Look,
    chip_name,
    control_lines,
    cut_line,
    end_labels,
    end_name,
    frame,
    kept_axis,
    rgba,
    safe,
    title,
)

TOP = 101.5
"""Upper end of every accuracy axis, in %: markers at 100 stay whole."""
FEW = 4
"""Maximum curves that are all drawn in full. Of more only the one that is cut is."""


def curve_figure(
    report: RunReport,
    *,
    cut: Cut,
    split: Split = "validation",
    look: Look = LIGHT,
) -> go.Figure:
    """Draw accuracy over layers of every chip, its interval, the controls and the cut.

    Each point carries `customdata = [layer, vector, kind]`, so a click names a cut.

    Args:
        report: A finished run.
        cut: Where to cut. Everything right of its layer is washed out. Its point is ringed.
        split: Whose scores to draw.
        look: Colours of the page's theme.
    """
    layers = report.backbone.n_layers
    curves = _curves(report.scores, split)
    figure = go.Figure()
    for key in curves:
        if _is_strong(key, curves, cut.chip):
            figure.add_traces(_bands(curves[key], look))
    for key, scores in curves.items():
        strong = _is_strong(key, curves, cut.chip)
        layer = [s.layer for s in scores]
        words, no_cut = _hover(scores, report), report.backbone.no_cut
        figure.add_trace(_line(scores, layer, words, look, strong=strong, no_cut=no_cut))
    y_range = (_floor(report, split), TOP)
    kept = [
        100 * (1 - report.cost_at(Cut(layer, cut.chip)).parameter_ratio) for layer in range(layers)
    ]
    kept_axis(figure, kept, look)
    frame(figure, look, n_layers=layers, y_range=y_range)
    ends = _ends(curves, cut.chip, look)
    values = _control_values(report, split, curves[cut.chip][-1])
    ends += control_lines(figure, values, look)
    end_labels(figure, ends, x=layers - 0.2, y_range=y_range)
    cut_line(figure, cut.layer, layers, look)
    _ring(figure, report.score_at(cut, split), look)
    subtitle = _subtitle(report, curves, cut.chip)
    title(figure, f"Accuracy of a chip on every layer: {safe(report.task.name)}", subtitle, look)
    figure.update_layout(margin_t=132 if "<br>" in subtitle else 116)
    return figure


def live_figure(
    points: Sequence[CurvePoint], *, total: int | None = None, look: Look = LIGHT
) -> go.Figure:
    """Draw the newest state of growing curves, with the state before each as a faint ghost.

    The axes depend only on each curve's first state, so nothing jumps while it grows.

    Args:
        points: The history of a run, in any order. May be empty.
        total: Training texts the run will read, where it is known.
        look: Colours of the page's theme.
    """
    figure = go.Figure()
    layers = 1 + max((p.cut.layer for p in points), default=29)
    ends: list[End] = []
    first: list[float] = []
    for key in in_order(p.cut.chip for p in points):
        own = [p for p in points if p.cut.chip == key]
        steps = sorted({p.n_train for p in own})
        first += [p.accuracy for p in own if p.n_train == steps[0]]
        for step in steps[-2:-1]:
            figure.add_trace(_live_line(own, step, key, look, ghost=True))
        figure.add_trace(_live_line(own, steps[-1], key, look, ghost=False))
        last = max((p for p in own if p.n_train == steps[-1]), key=lambda p: p.cut.layer)
        ends.append(End(100 * last.accuracy, end_name(key), look.ink(key.vector)))
    y_range = (_below(min(first, default=0.0)), TOP)
    frame(figure, look, n_layers=layers, y_range=y_range)
    end_labels(figure, ends, x=layers - 0.2, y_range=y_range)
    of = f" of {total:,}" if total else ""
    newest = max((p.n_train for p in points), default=0)
    seen = f"after {newest:,}{of} texts" if newest else "waiting for the first texts"
    title(figure, "Accuracy of a chip on every layer, growing", f"validation, {seen}", look)
    return figure


def size_figure(
    report: RunReport,
    *,
    cut: Cut,
    split: Split = "validation",
    look: Look = LIGHT,
) -> go.Figure:
    """Draw accuracy against the share of parameters a cut keeps, in %."""
    curves = _curves(report.scores, split)
    figure = go.Figure()
    for key, scores in curves.items():
        strong = _is_strong(key, curves, cut.chip)
        costs = [report.cost_at(s.cut) for s in scores]
        kept = [100 * (1 - c.parameter_ratio) for c in costs]
        words = [
            f"{text} - {c.weight_bytes / 1e6:,.0f} MB"
            for text, c in zip(_hover(scores, report), costs, strict=True)
        ]
        no_cut = report.backbone.no_cut
        figure.add_trace(_line(scores, kept, words, look, strong=strong, no_cut=no_cut))
    y_range = (_floor(report, split), TOP)
    frame(figure, look, n_layers=None, y_range=y_range)
    figure.update_xaxes(title_text="parameters kept, %", range=[0, 102])
    end_labels(figure, _ends(curves, cut.chip, look), x=102, y_range=y_range)
    place = 100 * (1 - report.cost_at(cut).parameter_ratio)
    at = report.score_at(cut, split)
    figure.add_vline(x=place, line_color=look.accent, line_width=2)
    _ring(figure, at, look, x=place)
    title(figure, "Accuracy against size", f"{split}, n = {at.n:,}; the line is the cut", look)
    return figure


def learning_figure(
    points: Sequence[CurvePoint],
    *,
    cut: Cut,
    look: Look = LIGHT,
) -> go.Figure:
    """Draw one chip's accuracy against training texts: strong at the cut, faint at the end."""
    figure = go.Figure()
    own = sorted((p for p in points if p.cut.chip == cut.chip), key=lambda p: p.n_train)
    last = max((p.cut.layer for p in own), default=0)
    vector, name = cut.chip.vector, chip_name(cut.chip)
    ends: list[End] = []
    for layer in dict.fromkeys((last, cut.layer)):
        here = [p for p in own if p.cut.layer == layer]
        strong = layer == cut.layer
        figure.add_trace(
            go.Scatter(
                x=[p.n_train for p in here],
                y=[100 * p.accuracy for p in here],
                mode="lines+markers",
                name=f"{name}, layer {layer}",
                line={"color": look.series(vector), "width": 2.5 if strong else 1},
                opacity=1 if strong else 0.5,
                marker={"size": MARKER_PX if strong else 5},
                hovertemplate="%{x:,} texts: %{y:.1f} %<extra>%{fullData.name}</extra>",
            )
        )
        if here:
            value = 100 * here[-1].accuracy
            ends.append(End(value, f"layer {layer}", look.ink(vector), bold=strong))
    y_range = (_below(min((p.accuracy for p in own), default=0.0)), TOP)
    end = max((p.n_train for p in own), default=1)
    frame(figure, look, n_layers=None, y_range=y_range)
    figure.update_xaxes(title_text="training texts", range=[0, 1.03 * end])
    end_labels(figure, ends, x=1.03 * end, y_range=y_range)
    title(
        figure,
        f"How many texts the chip needs: {name}",
        f"validation; strong: layer {cut.layer} (the cut), faint: layer {last} (the last)",
        look,
    )
    return figure


def picked(points: Sequence[Any]) -> Cut | None:
    """The cut that a clicked point names. None for an empty or foreign selection."""
    for point in points:
        data = point.get("customdata") or []
        if len(data) >= 3:
            with suppress(ValueError):
                return Cut(int(data[0]), ChipKey.named(str(data[1]), str(data[2])))
    return None


def _curves(scores: Iterable[Score], split: Split) -> dict[ChipKey, list[Score]]:
    """The scores of one split by chip, each ordered by layer."""
    curves: dict[ChipKey, list[Score]] = {}
    for score in sorted(scores, key=lambda s: s.layer):
        if score.split == split and score.layer >= 0:
            curves.setdefault(score.key, []).append(score)
    return {key: curves[key] for key in in_order(curves)}


def _is_strong(key: ChipKey, curves: Iterable[ChipKey], cut: ChipKey) -> bool:
    """Whether a curve is drawn in full: of many, only the one that is cut."""
    return key == cut or len(list(curves)) <= FEW


def _ends(curves: dict[ChipKey, list[Score]], cut: ChipKey, look: Look) -> list[End]:
    return [
        End(
            100 * scores[-1].accuracy,
            end_name(key),
            look.ink(key.vector),
            bold=_is_strong(key, curves, cut),
        )
        for key, scores in curves.items()
    ]


def _subtitle(report: RunReport, curves: dict[ChipKey, list[Score]], cut: ChipKey) -> str:
    """Split, n, preset, and what the bands are: in one line where that fits a phone."""
    own = curves[cut][0]
    preset = "sound, beside it as published" if report.preset == "published" else "sound"
    folds = f", {report.folds} folds" if own.split == "validation" and report.folds > 1 else ""
    scored = f"{own.split}{folds}, n = {own.n:,}, preset {preset}"
    of = "" if len(curves) <= FEW else f" of {chip_name(cut)}"
    n_again = max(len(curves[k][0].repeats) for k in curves if _is_strong(k, curves, cut))
    if n_again:
        return f"{scored}<br>pale: 95 % interval{of}; strong: spread of {1 + n_again} fits"
    gap = "<br>" if of or report.preset == "published" else ", "
    return f"{scored}{gap}95 % interval{of} shaded"


def _bands(scores: Sequence[Score], look: Look) -> list[go.Scatter]:
    """What another draw of texts would do: scored ones (interval), training ones (fits)."""
    name = chip_name(scores[0].key)
    spans = [([s.accuracy_low for s in scores], [s.accuracy_high for s in scores])]
    names, opacities = [f"{name}, 95 % interval"], [BAND_OPACITY]
    n_again = len(scores[0].repeats)
    if n_again:
        fits = [(s.accuracy, *s.repeats) for s in scores]
        spans.append(([min(f) for f in fits], [max(f) for f in fits]))
        names.append(f"{name}, {1 + n_again} fits")
        opacities.append(FITS_OPACITY)
    layers = [s.layer for s in scores]
    return [
        go.Scatter(
            x=[*layers, *reversed(layers)],
            y=[100 * value for value in (*high, *reversed(low))],
            fill="toself",
            fillcolor=rgba(look.series(scores[0].key.vector), opacity),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            name=label,
        )
        for (low, high), label, opacity in zip(spans, names, opacities, strict=True)
    ]


def _line(
    scores: Sequence[Score],
    x: Sequence[float],
    hover: Sequence[str],
    look: Look,
    *,
    strong: bool,
    no_cut: Mapping[int, str],
) -> go.Scatter:
    """One curve. Points of layers that the model cannot be cut after are grey."""
    key = scores[0].key
    colour = look.series(key.vector)
    colours = [look.muted if s.layer in no_cut else colour for s in scores]
    return go.Scatter(
        x=list(x),
        y=[100 * s.accuracy for s in scores],
        mode="lines+markers",
        name=chip_name(key),
        opacity=1 if strong else 0.85,
        line={"color": colour, "width": 2 if strong else 1.2, "dash": DASHES[key.word]},
        marker={
            "size": MARKER_PX if strong else MARKER_PX - 3,
            "color": colours if no_cut else colour,
            "symbol": SYMBOLS[key.word],
        },
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        customdata=[[s.layer, key.vector.name, key.word] for s in scores],
        text=list(hover),
        hoverinfo="text",
    )


def _hover(scores: Iterable[Score], report: RunReport) -> list[str]:
    return [_point_words(score, report) for score in scores]


def _point_words(score: Score, report: RunReport) -> str:
    kept = 100 * (1 - report.cost_at(score.cut).parameter_ratio)
    kind = KINDS[score.key.word]
    fits = [100 * accuracy for accuracy in (score.accuracy, *score.repeats)]
    no_cut = " - cannot be cut after" if score.layer in report.backbone.no_cut else ""
    return (
        f"layer {score.layer} - {score.key.vector.name}, {kind}"
        f"{', as published' if score.key.by_paper else ''} - {100 * score.accuracy:.1f} % "
        f"({100 * score.accuracy_low:.1f}-{100 * score.accuracy_high:.1f}, n = {score.n:,}) - "
        f"{f'{len(fits)} fits {min(fits):.1f}-{max(fits):.1f} - ' if score.repeats else ''}"
        f"keeps {kept:.0f} %{no_cut}"
    )


def _live_line(
    points: Sequence[CurvePoint], step: int, key: ChipKey, look: Look, *, ghost: bool
) -> go.Scatter:
    own = sorted((p for p in points if p.n_train == step), key=lambda p: p.cut.layer)
    name, dash, symbol = chip_name(key), DASHES[key.word], SYMBOLS[key.word]
    return go.Scatter(
        x=[p.cut.layer for p in own],
        y=[100 * p.accuracy for p in own],
        mode="lines" if ghost else "lines+markers",
        name=f"{name}, after {step:,} texts",
        line={"color": look.series(key.vector), "width": 1.5 if ghost else 2, "dash": dash},
        opacity=0.25 if ghost else 1.0,
        marker={"size": MARKER_PX, "symbol": symbol},
        hoverinfo="skip" if ghost else None,
        hovertemplate=None if ghost else "layer %{x}: %{y:.1f} %<extra>" + name + "</extra>",
    )


def _floor(report: RunReport, split: Split) -> float:
    """Lower end of the y axis, in %: under chance and under everything that is drawn."""
    drawn = [s.accuracy for s in report.scores if s.split == split]
    controls = report.controls if split == "test" else report.controls_validation
    return _below(min([*drawn, controls.majority, 1 / report.task.n_classes]))


def _below(accuracy: float) -> float:
    """The multiple of ten (in %) at least three points under `accuracy`."""
    return max(0.0, 10 * np.floor((100 * accuracy - 3) / 10))


def _control_values(report: RunReport, split: Split, last: Score) -> dict[str, float]:
    controls = report.controls if split == "test" else report.controls_validation
    values = {
        "majority": controls.majority,
        "embedding": controls.embedding,
        "last layer": last.accuracy,
        **controls.beside,
    }
    if controls.zero_shot is not None:
        values["model itself"] = controls.zero_shot
    return values


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
