"""The reward curve with held-out pass@1: in the terminal, and as a picture that any browser opens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rlkd.report.braille import Canvas
from rlkd.report.history import History

Point = tuple[float, float, float]  # pass@1 and its 95 % interval
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 340, 56, 40, 56  # of the picture


@dataclass(frozen=True)
class Curve:
    """What is drawn, and the scale for it: steps 0 … `last`, values `bottom` … `top`."""

    steps: Sequence[int]
    rewards: Sequence[float]  # NaN where unknown
    points: Mapping[int, Point]
    window: int

    @classmethod
    def of(cls, history: History) -> "Curve":
        steps, rewards = history.series("reward/mean")
        return cls(steps, rewards, history.pass_at(1), max(3, len(steps) // 15 | 1))

    @property
    def smooth(self) -> list[float]:
        return smoothed(self.rewards, self.window)

    @property
    def last(self) -> int:
        return max([1, *self.steps, *self.points])

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value: 0 and 1 at least, as rewards and pass@1 usually are there."""
        known = [v for v in self.rewards if math.isfinite(v)] + [v for p in self.points.values() for v in p]
        return float(min([0, *known])), float(max([1, *known]))

    def at(self, step: int, value: float) -> tuple[float, float]:
        bottom, top = self.bounds
        return step / self.last, (value - bottom) / (top - bottom)

    @property
    def legend(self) -> list[str]:
        points = ["● held-out pass@1 with 95 % interval"] if self.points else []
        return [f"reward, mean of {self.window} steps", *points]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` values around each: no lag. Unknown values are left out; NaN where all are unknown."""
    half, means = window // 2, []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def terminal(history: History, width: int = 72, height: int = 14) -> str:
    """The curve as text of at most `width` columns; empty when there is nothing to draw."""
    curve = Curve.of(history)
    if not curve.steps and not curve.points:
        return ""
    bottom, top = curve.bounds
    labels = [f"{top - (top - bottom) * row / (height - 1):6.2f}" if row % 3 == 1 else "" for row in range(height)]
    labels[0], labels[-1] = f"{top:6.2f}", f"{bottom:6.2f}"
    margin = max(len(label) for label in labels)
    canvas = Canvas(max(10, width - margin - 2), height)
    known = [(s, v) for s, v in zip(curve.steps, curve.smooth, strict=True) if math.isfinite(v)]
    for before, after in zip(known, known[1:] or known, strict=False):
        canvas.line(*curve.at(*before), *curve.at(*after))
    for step, (value, low, high) in curve.points.items():
        x, y = curve.at(step, value)
        canvas.mark(x, y, curve.at(step, low)[1], curve.at(step, high)[1])
    rows = [f"{label:>{margin}} ┤{row.rstrip()}" for label, row in zip(labels, canvas.rows(), strict=True)]
    steps = f"{0:<{canvas.width - len(str(curve.last))}}{curve.last}"
    below = [f"{'':>{margin}} └{'─' * canvas.width}", f"{'step':>{margin}}  {steps}"]
    one = "   ".join(curve.legend)
    legend = [one] if len(one) <= canvas.width else curve.legend
    return "\n".join([*rows, *below, *(f"{'':>{margin}}  {line}" for line in legend)])


def svg(history: History, title: str) -> str:
    """A self-contained SVG picture: every step faint, the smoothed curve, held-out points with intervals."""
    curve = Curve.of(history)
    grid, (bottom, top) = [], curve.bounds
    for i in range(5):
        value = bottom + (top - bottom) * i / 4
        x, y = _pixel(curve, 0, value)
        grid.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - 20}" y2="{y}" stroke="#e2e2e2"/>')
        grid.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
    for step in sorted({0, curve.last // 2, curve.last}):
        x, y = _pixel(curve, step, bottom)
        grid.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{step}</text>')
    points = []
    for step, (value, low, high) in curve.points.items():
        (x, y), (_, y_low), (_, y_high) = (_pixel(curve, step, v) for v in (value, low, high))
        points.append(f'<line x1="{x}" y1="{y_low}" x2="{x}" y2="{y_high}" stroke="#c0392b" stroke-width="2"/>')
        points.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#c0392b"/>')
    faint = _line(curve, curve.rewards, 'stroke="#a9c3dc"')
    bold = _line(curve, curve.smooth, 'stroke="#1f4e79" stroke-width="2.5"')
    legend = f"steps · thin: reward of every step · thick: {' · '.join(curve.legend)}"
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">{escape(legend)}</text>',
        *grid, faint, bold, *points, "</svg>", "",
    ])  # fmt: skip


def _pixel(curve: Curve, step: int, value: float) -> tuple[float, float]:
    x, y = curve.at(step, value)
    return round(LEFT + (WIDTH - LEFT - 20) * x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y, 1)


def _line(curve: Curve, values: Sequence[float], style: str) -> str:
    known = [_pixel(curve, s, v) for s, v in zip(curve.steps, values, strict=True) if math.isfinite(v)]
    points = " ".join(f"{x},{y}" for x, y in known)
    return f'<polyline fill="none" {style} points="{points}"/>'
