"""The curve of a bundle's card as a picture: test accuracy of the same chip on every layer."""

from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from chipviz.config import CutSpec
from chipviz.keys import Cut
from chipviz.results.report import RunReport

FILE = "curve.png"
_SCALE = 2
"""Drawn so many times as large and made smaller: lines without steps."""
_SIZE = (760, 320)
_FRAME = (64, 34, 736, 270)
"""Left, top, right and bottom of the plot."""
_INK, _FAINT, _LINE = "#1d2b2a", "#d9e0df", "#0f766e"


def draw_curve(report: RunReport, cut: CutSpec) -> bytes:
    """A PNG file: accuracy over layers, the cut marked.

    Args:
        report: The run.
        cut: Whose chip is drawn, and where it was cut.
    """
    values = [
        report.score_at(Cut(layer, cut.key), "test").accuracy
        for layer in range(report.backbone.n_layers)
    ]
    image = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), "white")
    pen = _Pen(ImageDraw.Draw(image), values)
    pen.axes()
    pen.curve()
    pen.cut(cut.cut_layer)
    small = image.resize(_SIZE, Image.Resampling.LANCZOS)
    file = BytesIO()
    small.save(file, "PNG", optimize=True)
    return file.getvalue()


class _Pen:
    """Draws in units of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw, values: list[float]) -> None:
        self._draw, self._values = draw, values
        self._font = ImageFont.load_default(13 * _SCALE)
        # Whole tenths around the values, so that the axis has round numbers.
        self._high = min(1.0, int(10 * max(values) + 1) / 10)
        self._low = min(int(10 * min(values)) / 10, self._high - 0.1)

    def axes(self) -> None:
        """Grid lines at each tenth, and numbers."""
        left, _, right, bottom = _FRAME
        for tenth in range(round(10 * self._low), round(10 * self._high) + 1):
            y = self._y(tenth / 10)
            self._lines([(left, y), (right, y)], _FAINT, 1)
            self._text((left - 8, y), f"{10 * tenth} %", "rm")
        step = max(1, len(self._values) // 10)
        for layer in range(0, len(self._values), step):
            self._text((self._x(layer), bottom + 8), str(layer), "ma")
        self._text(((left + right) / 2, bottom + 28), "layer", "ma")

    def curve(self) -> None:
        """The line, and a point for each layer."""
        points = [(self._x(i), self._y(value)) for i, value in enumerate(self._values)]
        self._lines(points, _LINE, 2)
        for x, y in points:
            self._dot(x, y, 2.5)

    def cut(self, layer: int) -> None:
        """Where the bundle ends."""
        x, value = self._x(layer), self._values[layer]
        self._lines([(x, _FRAME[1]), (x, _FRAME[3])], _INK, 1)
        self._dot(x, self._y(value), 5)
        anchor = "lb" if layer < len(self._values) / 2 else "rb"
        self._text((x, _FRAME[1] - 4), f"cut at layer {layer}: {100 * value:.1f} %", anchor)

    def _x(self, layer: float) -> float:
        left, _, right, _ = _FRAME
        return left + (right - left) * layer / max(1, len(self._values) - 1)

    def _y(self, value: float) -> float:
        _, top, _, bottom = _FRAME
        return bottom - (bottom - top) * (value - self._low) / (self._high - self._low)

    def _lines(self, points: list[tuple[float, float]], colour: str, width: int) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=width * _SCALE, joint="curve")

    def _dot(self, x: float, y: float, radius: float) -> None:
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE]
        box += [(x + radius) * _SCALE, (y + radius) * _SCALE]
        self._draw.ellipse(box, fill=_LINE)

    def _text(self, at: tuple[float, float], text: str, anchor: str) -> None:
        place = (at[0] * _SCALE, at[1] * _SCALE)
        self._draw.text(place, text, fill=_INK, font=self._font, anchor=anchor)
