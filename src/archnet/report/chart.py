"""Charts as SVG elements of a page: colours are the page's own, light or dark, by class."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from archnet.errors import printable

COLOURS = 8
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 58, 14, 10, 38


@dataclass(frozen=True)
class Line:
    """A curve; a ``hidden`` one is drawn when the page is asked for it."""

    name: str
    points: Sequence[tuple[float, float]]
    hidden: bool = False


@dataclass(frozen=True)
class Mark:
    """A point with its name, and how far it reaches up and down (an interval)."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    best: bool = False


class _Axes:
    """From figures to places in the picture."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], height: int, log: bool = False
    ) -> None:
        self.log, self.height = log, height
        self.x0, self.x1 = _padded(min(xs), max(xs))
        if log:
            low, high = math.log10(min(ys)), math.log10(max(ys))
            self.y0, self.y1 = math.floor(10 * low - 0.5) / 10, math.ceil(10 * high + 0.5) / 10
        else:
            self.y0, self.y1 = _padded(min(ys), max(ys))

    def at(self, x: float, y: float) -> tuple[float, float]:
        if self.log:
            y = math.log10(y)
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (1 - up) * (self.height - _TOP - _BOTTOM),
        )

    def frame(self, x_label: str, y_label: str) -> list[str]:
        """Grid, numbers and titles."""
        parts, bottom = [], self.height - _BOTTOM
        for value in _ticks(self.x0, self.x1):
            x, _ = self.at(value, 10**self.y0 if self.log else self.y0)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            )
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>'
            )
        if self.log:
            decades = range(math.floor(self.y0), math.ceil(self.y1) + 1)
            values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            values = [v for v in values if self.y0 <= math.log10(v) <= self.y1]
            if len(values) > 7:
                values = [v for v in values if math.log10(v).is_integer()]
        else:
            values = _ticks(self.y0, self.y1)
        for value in values:
            _, y = self.at(self.x0, value)
            right = _WIDTH - _RIGHT
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{self.height - 5}" text-anchor="middle">{_text(x_label)}</text>'
        )
        centre = self.height / 2
        parts.append(
            f'<text transform="rotate(-90 12 {centre})" x="12" y="{centre}" text-anchor="middle">'
            f"{_text(y_label)}</text>"
        )
        return parts


def lines_chart(
    lines: Sequence[Line], x_label: str, y_label: str, *, log: bool = True, height: int = 240
) -> str:
    """Curves over one axis, by default with a logarithmic height; empty where there are none.

    The first `COLOURS` have a colour each; others are hidden, whatever they say, and share one.
    """
    drawn = []
    for line in lines:
        points = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]
        if points:
            drawn.append((line, points))
    if not drawn:
        return ""
    axes = _Axes(
        [x for _, points in drawn for x, _ in points],
        [y for _, points in drawn for _, y in points],
        height,
        log,
    )
    parts = axes.frame(x_label, y_label)
    for number, (line, points) in enumerate(drawn):
        places = [axes.at(*point) for point in points]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        hidden = " hidden" if line.hidden or number >= COLOURS else ""
        kind = f"s{min(number, COLOURS - 1)}{hidden}"
        title = f"<title>{_text(line.name)}</title>"
        if len(places) == 1:
            (x, y) = places[0]
            parts.append(
                f'<circle class="dot {kind}" data-line="{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"{title}</circle>"
            )
        else:
            parts.append(
                f'<polyline class="line {kind}" data-line="{number}" points="{shown}">{title}'
                "</polyline>"
            )
    return _svg(parts, height)


def marks_chart(marks: Sequence[Mark], x_label: str, y_label: str, height: int = 320) -> str:
    """Points over two axes, the best of them joined; empty where there are none."""
    if not marks:
        return ""
    ys = [y for m in marks for y in (m.y, m.low, m.high) if y is not None]
    axes = _Axes([m.x for m in marks], ys, height)
    parts = axes.frame(x_label, y_label)
    best = sorted((m.x, m.y) for m in marks if m.best)
    if len(best) > 1:
        places = " ".join("{:.1f},{:.1f}".format(*axes.at(*point)) for point in best)
        parts.append(f'<polyline class="line s0 front" points="{places}"/>')
    for mark in marks:
        x, y = axes.at(mark.x, mark.y)
        if mark.low is not None and mark.high is not None:
            ends = axes.at(mark.x, mark.low)[1], axes.at(mark.x, mark.high)[1]
            parts.append(
                f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" '
                f'y2="{ends[1]:.1f}"/>'
            )
        kind = "dot s0" if mark.best else "dot other"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(
            f'<text class="name" x="{x + 8:.1f}" y="{y - 7:.1f}">{_text(mark.name)}</text>'
        )
    return _svg(parts, height)


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _text(text: str) -> str:
    return html.escape(printable(text))


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or max(abs(low) * 0.06, 0.5)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers between two."""
    rough = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
