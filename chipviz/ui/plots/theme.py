"""The visual language of every figure: theme colours, axes, titles, labels and washes.

Knows plotly and pixels, neither runs nor scores.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from chipviz.keys import TEXT_POOLINGS, ChipKey, Site, Vector

_HUES: dict[Site, tuple[str, ...]] = {
    "raw": ("#56b4e9", "#2f86b5", "#7cc3ea", "#4a9cc9"),
    "gate": ("#7f6a00", "#a68b00", "#bfa51a", "#8c7a1e"),
    "ffn_in": ("#5b3f8c", "#8a63c7", "#a98fd6", "#6d5a99"),
    "ffn_out": ("#8c2d5b", "#b34a7c", "#cf7aa2", "#99456e"),
    "all": ("#2b2b2b", "#5c5c5c", "#7d7d7d", "#454545"),
}
SERIES: dict[Vector, str] = {
    Vector("block", "last"): "#0072b2",
    Vector("block", "mean"): "#d55e00",
    Vector("block", "first"): "#cc79a7",
    Vector("block", "max"): "#009e73",
    Vector("block", "first+mean"): "#b8860b",
    **{
        Vector(site, pooling): colour
        for site, colours in _HUES.items()
        for pooling, colour in zip(TEXT_POOLINGS, colours, strict=True)
    },
}
"""Line colour of a vector. Source of the first five: Okabe and Ito 2008, safe for colour-blind
readers. Sites have one hue each."""
DASHES = {
    "linear": "solid",
    "mlp": "dash",
    "sparse": "dot",
    "sparse-published": "dashdot",
    "stc": "solid",
    "stc-published": "longdash",
}
SYMBOLS = {
    "linear": "circle",
    "mlp": "diamond-open",
    "sparse": "x-thin-open",
    "sparse-published": "cross-thin-open",
    "stc": "star",
    "stc-published": "star-open",
}
"""Between neighbouring layers a line is too short for its dashes to show: markers differ too."""
KINDS = {
    "linear": "linear",
    "mlp": "MLP",
    "sparse": "L1",
    "sparse-published": "L1",
    "stc": "STC",
    "stc-published": "STC",
}
"""What people call a chip's `word`."""
CLASS_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#8a8a8a",
)
"""Fill colour of a class, in the Okabe-Ito order."""
WASH = 0.65
"""Opacity of the wash over what a cut removes: 35 % of it stays visible."""
FONT = "'Source Sans', 'Source Sans Pro', sans-serif"
"""The page's own font."""
MARKER_PX = 9
BAND_OPACITY = 0.15
FITS_OPACITY = 0.38
"""Opacity of the band that several fits span. It stands out on that of the interval."""


@dataclass(frozen=True)
class Look:
    """The colours of a theme that a figure cannot take from the page."""

    paper: str
    text: str
    muted: str
    grid: str
    accent: str
    on_accent: str
    """Text on a filled accent button."""
    lift: float = 0.0
    """Share of white mixed into series colours, so that they stand out on a dark page."""

    def series(self, vector: Vector) -> str:
        """The line colour of a vector on this theme."""
        return mix_white(SERIES[vector], self.lift)

    def ink(self, vector: Vector) -> str:
        """The same colour nearer to the text's, for letters: pale ones could not be read."""
        return mix(self.series(vector), self.text, 0.35)


@dataclass(frozen=True)
class End:
    """The label at a line's right end."""

    value: float
    """Accuracy in %."""
    name: str
    colour: str
    bold: bool = True


LIGHT = Look("#ffffff", "#1c2726", "#6b7776", "#e3e9e8", "#0f766e", "#ffffff")
DARK = Look("#101716", "#e4ebea", "#93a09e", "#2a3634", "#2dd4bf", "#06211e", lift=0.28)


def frame(
    figure: go.Figure, look: Look, *, n_layers: int | None, y_range: tuple[float, float]
) -> None:
    """Set size, margins, axes and click behaviour. With `n_layers` the x axis counts layers."""
    axis = {
        "gridcolor": look.grid,
        "zeroline": False,
        "tickfont": {"color": look.muted},
        "title_font": {"color": look.muted},
        "fixedrange": True,
    }
    figure.update_layout(
        height=500,
        margin={"l": 52, "r": 116, "t": 84, "b": 44},
        paper_bgcolor=look.paper,
        plot_bgcolor=look.paper,
        font={"color": look.text, "family": FONT},
        showlegend=False,
        hovermode="closest",
        hoverdistance=12,
        clickmode="event+select",
        dragmode=False,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(range=list(y_range), title_text="accuracy, %", **axis)
    if n_layers is not None:
        figure.update_layout(
            xaxis={"title": {"text": "layer"}, "range": [-0.8, n_layers - 0.2], "dtick": 5}
        )


def title(figure: go.Figure, text: str, subtitle: str, look: Look) -> None:
    """Say what is seen, and below it on what. Both are already safe for plotly."""
    figure.update_layout(
        title={
            "text": text,
            "font": {"size": 18, "color": look.text},
            "subtitle": {"text": subtitle, "font": {"size": 14, "color": look.muted}},
            "x": 0,
            "xref": "container",
            "y": 0.98,
            "yanchor": "top",
        }
    )


def end_labels(
    figure: go.Figure, ends: Sequence[End], *, x: float, y_range: tuple[float, float]
) -> None:
    """Name each line at its right end `x`, instead of a legend, and leave room for the names."""
    low, high = y_range
    longest = max((len(end.name) for end in ends), default=0)
    figure.update_layout(margin_r=max(116, 8 * longest + 40))
    # Room for the letters of the outermost labels, which stand half above and half below.
    room = (high - low) / 40
    places = spread(
        [end.value for end in ends], gap=(high - low) / 21, low=low + room, high=high - room
    )
    for end, place in zip(ends, places, strict=True):
        name = f"<b>{end.name}</b>" if end.bold else end.name
        figure.add_annotation(
            x=x,
            xanchor="left",
            y=place,
            text=f"{name} {end.value:.1f}",
            showarrow=False,
            font={"size": 13 if end.bold else 12, "color": end.colour},
        )


def wash(figure: go.Figure, look: Look, **box: float) -> None:
    """Veil a box (x0, x1 or y0, y1 in data units) to 35 %. A side not given is the whole axis."""
    whole = {"x0": 0, "x1": 1, "xref": "paper"} if "x0" not in box else {}
    tall = {"y0": 0, "y1": 1, "yref": "paper"} if "y0" not in box else {}
    figure.add_shape(
        type="rect",
        layer="above",
        fillcolor=look.paper,
        opacity=WASH,
        line_width=0,
        **whole,
        **tall,
        **box,
    )


def spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until neighbours differ by `gap`, each cluster around its own mean.

    All stay between `low` and `high`. Where that is too tight, the gap shrinks.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    # Less their share of gaps, places need only rise: neighbours that fall are pooled.
    clusters: list[tuple[float, int]] = []
    for step, i in enumerate(order):
        mean, size = values[i] - step * gap, 1
        while clusters and clusters[-1][0] > mean:
            other, n = clusters.pop()
            mean, size = (mean * size + other * n) / (size + n), size + n
        clusters.append((mean, size))
    flat = [mean for mean, size in clusters for _ in range(size)]
    places = list(values)
    for step, (i, place) in enumerate(zip(order, flat, strict=True)):
        places[i] = min(max(place, low), high - (len(values) - 1) * gap) + step * gap
    return places


def tint(colour: str, strength: float) -> str:
    """Pale a class colour: strength 0 leaves a breath of it, 1 most of it."""
    return mix_white(colour, 0.88 - 0.68 * strength)


def mix_white(colour: str, share: float) -> str:
    """Mix a share of white, in [0, 1], into `colour` (#rrggbb)."""
    return mix(colour, "#ffffff", share)


def mix(colour: str, other: str, share: float) -> str:
    """Mix a share of `other`, in [0, 1], into `colour` (both #rrggbb)."""
    pairs = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(own + (new - own) * share):02x}" for own, new in pairs)


def rgba(colour: str, opacity: float) -> str:
    """Give `colour` (#rrggbb) an opacity in [0, 1]."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def chip_name(key: ChipKey) -> str:
    """What people call a chip: `mean`, `mean, MLP`, `raw, as published`."""
    name = key.vector.name if key.word == "linear" else f"{key.vector.name}, {KINDS[key.word]}"
    return f"{name}, as published" if key.by_paper else name


def end_name(key: ChipKey) -> str:
    """The same, short enough for the end of a line."""
    if key.lucky:  # several of these read different vectors
        return f"{key.vector.name}, {KINDS[key.word]} published"
    name = "published" if key.by_paper else key.vector.name
    return name if key.word == "linear" else f"{name}, {KINDS[key.word]}"


def safe(text: str) -> str:
    """Text from data as plotly shows it: tags and entities as characters."""
    return html.escape(text, quote=False)


def short(text: str, limit: int) -> str:
    """One safe line of at most `limit` characters."""
    line = " ".join(text.split()) or "⏎"
    return safe(line if len(line) <= limit else line[: limit - 1] + "…")


def kept_axis(figure: go.Figure, kept: Sequence[float], look: Look) -> None:
    """A second axis on top: the parameters, in %, that a cut at each layer keeps."""
    step = max(1, len(kept) // 6)
    ticks = list(range(0, len(kept), step))
    figure.add_trace(go.Scatter(x=[None], y=[None], xaxis="x2", hoverinfo="skip"))
    figure.update_layout(
        xaxis2={
            "overlaying": "x",
            "side": "top",
            "range": [-0.8, len(kept) - 0.2],
            "tickmode": "array",
            "tickvals": ticks,
            "ticktext": [f"{kept[layer]:.0f}" for layer in ticks],
            "title": {"text": "parameters kept, %", "standoff": 4, "font": {"color": look.muted}},
            "tickfont": {"color": look.muted},
            "showgrid": False,
            "fixedrange": True,
        }
    )


def cut_line(figure: go.Figure, cut_layer: int, n_layers: int, look: Look) -> None:
    """Draw the cut and wash out the layers it removes."""
    wash(figure, look, x0=cut_layer + 0.5, x1=n_layers - 0.2)
    figure.add_vline(x=cut_layer + 0.5, line_color=look.accent, line_width=2)
    figure.add_annotation(
        x=cut_layer + 0.5,
        y=0,
        yref="paper",
        yanchor="bottom",
        xanchor="right" if cut_layer > n_layers / 2 else "left",
        text=f"<b>cut at layer {cut_layer}</b>",
        showarrow=False,
        font={"size": 13, "color": look.accent},
        bgcolor=look.paper,
    )


def class_scale() -> list[tuple[float, str]]:
    """One pale-to-full ramp a class colour, side by side on [0, 1]."""
    n = len(CLASS_COLOURS)
    scale: list[tuple[float, str]] = []
    for i, colour in enumerate(CLASS_COLOURS):
        scale += [(i / n, tint(colour, 0.0)), ((i + 1) / n, tint(colour, 1.0))]
    return scale


def control_lines(figure: go.Figure, values: Mapping[str, float], look: Look) -> list[End]:
    """Draw reference accuracies, in [0, 1], as thin dotted lines. Returns their labels."""
    for value in values.values():
        figure.add_hline(y=100 * value, line={"color": look.muted, "width": 1, "dash": "dot"})
    return [End(100 * value, name, look.muted, bold=False) for name, value in values.items()]
