"""A sweep in one HTML file that needs no network: parallel coordinates, the curves, the table. Pictures are SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlkd.sweep.table import Row, short, shown

WIDTH, HEIGHT, MARGIN, TOP, BOTTOM = 960, 340, 70, 46, 44
STYLE = """body{font:14px/1.5 sans-serif;margin:2em auto;max-width:1000px;color:#222}
svg{width:100%;height:auto;background:#fff}svg text{font:12px sans-serif}
table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
pre{background:#f4f4f4;padding:.8em;overflow-x:auto}polyline:hover{stroke-width:5}"""


def page(title: str, rows: Sequence[Row], metric: str, mode: str, best: str | None, commands: Sequence[str]) -> str:
    """`best` is the best trial's name, `commands` are shown under it."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if best is not None:
        parts.append(f"<p>best: <b>{escape(best)}</b></p><pre>{escape(chr(10).join(commands))}</pre>")
    parts += ["<h2>Settings and result</h2>", parallel(rows, metric, mode)]
    parts += [f"<h2>{escape(metric)} by step</h2>", curves(rows, metric, mode), "<h2>Trials</h2>", _table(rows, metric)]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def parallel(rows: Sequence[Row], metric: str, mode: str) -> str:
    """One axis for each key and one for the metric, one line for each trial, its colour by the metric."""
    keys = list(dict.fromkeys(key for r in rows for key in r.values))
    columns: dict[str, list[Any]] = {key: [r.values.get(key) for r in rows] for key in keys}
    columns[metric] = [r.value if math.isfinite(r.value) else None for r in rows]
    axes = [_Axis(name, values, wide=name in keys) for name, values in columns.items()]
    gap = (WIDTH - 2 * MARGIN) / max(1, len(axes) - 1)
    drawn = [axis.svg(MARGIN + i * gap) for i, axis in enumerate(axes)]
    colours = _colours(rows, mode)
    for n, r in enumerate(rows):
        points = [(MARGIN + i * gap, y) for i, axis in enumerate(axes) if (y := axis.y(axis.values[n])) is not None]
        drawn.append(_line(points, colours[r.name], _label(r, metric)))
    return _svg(drawn)


def curves(rows: Sequence[Row], metric: str, mode: str) -> str:
    """The metric of each trial, at each evaluation."""
    known = [v for r in rows for v in r.curve.values() if math.isfinite(v)]
    if not known:
        return "<p>no trial was evaluated</p>"
    low, high = min(known), max(known)
    high = high if high > low else low + 1.0
    last = max((s for r in rows for s in r.curve), default=1) or 1
    drawn = []
    for i in range(5):
        value = low + (high - low) * i / 4
        y = _height(i / 4)
        drawn.append(f'<line x1="{MARGIN}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#e2e2e2"/>')
        drawn.append(f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for step in sorted({0, last // 2, last}):
        x = round(MARGIN + (WIDTH - MARGIN - 20) * step / last, 1)
        drawn.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    colours = _colours(rows, mode)
    for r in rows:
        points = [
            (MARGIN + (WIDTH - MARGIN - 20) * step / last, _height((v - low) / (high - low)))
            for step, v in r.curve.items()
            if math.isfinite(v)
        ]
        drawn.append(_line(points, colours[r.name], _label(r, metric)))
    return _svg(drawn)


class _Axis:
    """Numbers on a scale, with `wide` logarithmic if they span more than a factor of 30; anything else one by one."""

    def __init__(self, name: str, values: Sequence[Any], wide: bool) -> None:
        self.name, self.values = name, values
        known = [v for v in values if v is not None]
        self.numbers = bool(known) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
        if self.numbers:
            low: float = min(known)
            high: float = max(known)
            self.log = wide and low > 0 and high / low > 30
            self.low, self.high = (math.log(low), math.log(high)) if self.log else (low, high)
            self.ticks = sorted({low, high, *(known if len(set(known)) <= 6 else ())})
        else:
            self.ticks = list({short(v): v for v in known}.values())

    def share(self, value: Any) -> float:
        if not self.numbers:
            names = [short(v) for v in self.ticks]
            return (names.index(short(value)) + 0.5) / len(names)
        x = math.log(value) if self.log else value
        return 0.5 if self.high == self.low else (x - self.low) / (self.high - self.low)

    def y(self, value: Any) -> float | None:
        return None if value is None else _height(self.share(value))

    def svg(self, x: float) -> str:
        x = round(x, 1)
        parts = [f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#888"/>']
        parts.append(f'<text x="{x}" y="{TOP - 16}" text-anchor="middle">{escape(self.name)}</text>')
        parts += [f'<text x="{x + 5}" y="{_height(self.share(t)) + 4}">{escape(short(t))}</text>' for t in self.ticks]
        return "".join(parts)


def _height(share: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def _colours(rows: Sequence[Row], mode: str) -> Mapping[str, str]:
    """From blue (worst) over grey to red (best); light grey for a trial without a value."""
    known = sorted({r.value for r in rows if math.isfinite(r.value)}, reverse=mode == "min")
    found = {}
    for r in rows:
        share = known.index(r.value) / max(1, len(known) - 1) if math.isfinite(r.value) else None
        found[r.name] = "#ccc" if share is None else f"hsl({round(220 + 140 * share)},65%,50%)"
    return found


def _line(points: Sequence[tuple[float, float]], colour: str, label: str) -> str:
    if not points:
        return ""
    at = " ".join(f"{round(x, 1)},{y}" for x, y in points)
    dots = "".join(f'<circle cx="{round(x, 1)}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)
    title = f"<title>{escape(label)}</title>"
    return f'<g><polyline fill="none" stroke="{colour}" stroke-width="2" points="{at}">{title}</polyline>{dots}</g>'


def _label(row: Row, metric: str) -> str:
    values = ", ".join(f"{key}={short(value)}" for key, value in row.values.items())
    return f"{row.name} ({row.state}): {metric} {shown(row.value)} after {row.step} steps; {values}"


def _svg(parts: Sequence[str]) -> str:
    inner = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">\n{inner}\n</svg>'


def _table(rows: Sequence[Row], metric: str) -> str:
    keys = list(dict.fromkeys(key for r in rows for key in r.values))
    heads = ["trial", "state", "steps", metric, *keys, ""]
    lines = [heads]
    for r in rows:
        note = r.cause or "; ".join(r.copied)
        lines.append([r.name, r.state, str(r.step), shown(r.value), *(short(r.values.get(k)) for k in keys), note])
    marked = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
              for line, tag in zip(lines, ["th"] + ["td"] * len(rows), strict=True)]  # fmt: skip
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in marked) + "</table>"
