"""The reward curve: in the terminal, and as a picture that any browser opens."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 720, 320, 44


def smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """Trailing mean over up to `window` values; unknown values are left out."""
    out = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - window + 1) : i + 1] if not math.isnan(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def terminal(steps: Sequence[int], rewards: Sequence[float], evals: Mapping[int, float], width: int = 72) -> str:
    """The curve as text, with held-out pass@1 marked."""
    import plotext as plt

    plt.clear_figure()
    plt.theme("clear")
    plt.plot_size(width, 16)
    plt.plot(list(steps), smoothed(rewards), label="training reward (mean of 5 steps)")
    if evals:
        plt.scatter(list(evals), list(evals.values()), marker="◆", label="held-out pass@1")
    plt.ylim(0, max(1.0, *[r for r in rewards if not math.isnan(r)], 0.0))
    plt.xlabel("step")
    return str(plt.build())


def svg(steps: Sequence[int], rewards: Sequence[float], evals: Mapping[int, float], title: str) -> str:
    """The curve as a self-contained SVG picture: every step faint, the smoothed curve, held-out points."""
    known = [r for r in rewards if not math.isnan(r)]
    top, bottom = max([1.0, *known, *evals.values()]), min([0.0, *known])
    last = max([1, *steps, *evals])

    def at(step: float, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - bottom) / (top - bottom)
        return f"{x:.1f},{y:.1f}"

    def line(values: Sequence[float], style: str) -> str:
        points = " ".join(at(s, v) for s, v in zip(steps, values, strict=True) if not math.isnan(v))
        return f'<polyline fill="none" {style} points="{points}"/>'

    ticks = [bottom + (top - bottom) * i / 4 for i in range(5)]
    grid = "".join(
        f'<polyline stroke="#ddd" points="{at(0, t)} {at(last, t)}"/>'
        f'<text x="4" y="{at(0, t).split(",")[1]}" font-size="11">{t:.2f}</text>'
        for t in ticks
    )
    dots = "".join(
        '<circle cx="{}" cy="{}" r="5" fill="#c0392b"/>'.format(*at(s, v).split(",")) for s, v in evals.items()
    )
    legend = f"step 0 … {last} — thin: every step · thick: mean of 5 · dots: held-out pass@1"
    curves = line(rewards, 'stroke="#9bb8d3"') + line(smoothed(rewards), 'stroke="#1f4e79" stroke-width="2.5"')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{MARGIN}" y="18" font-size="14">{escape(title)}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}" font-size="11">{legend}</text>'
        f"{grid}{curves}{dots}</svg>"
    )
