"""What the terminal shows: a live picture where there is a terminal, one line a step where there is none."""

import math
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGES = ("rollout", "verify", "guide", "score", "learn", "sync", "save")


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


class Progress:
    """Shows steps as they come. Everything goes to stderr: stdout is for results."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self.steps = steps
        self.console = Console(file=stream or sys.stderr, highlight=False)
        self.first_reward: float | None = None
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(Text("starting …"), console=self.console, refresh_per_second=4)
            self.live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, row: Mapping[str, float], seconds: Mapping[str, float], sample: str) -> None:
        if self.first_reward is None:
            self.first_reward = row["reward/mean"]
        if self.live is None:
            self.say(self._line(step, row))
        else:
            self.live.update(self._picture(step, row, seconds, sample))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _line(self, step: int, row: Mapping[str, float]) -> str:
        change = row["reward/mean"] - (self.first_reward or 0.0)
        parts = [
            f"step {step}/{self.steps}",
            f"reward {number(row['reward/mean'])} ({change:+.3f})",
            f"length {number(row['length/mean'], 1)}",
            f"cut off {row['truncated']:.0%}",
            f"mismatch {row.get('mismatch/mean', math.nan):.1e}",
            f"{row['seconds']:.1f} s",
        ]
        return "  ".join(parts)

    def _picture(
        self, step: int, row: Mapping[str, float], seconds: Mapping[str, float], sample: str
    ) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=False)
        head.add_row(Text(self._line(step, row)))
        head.add_row(ProgressBar(total=self.steps, completed=step, width=min(60, self.console.width - 2)))
        bars = Table.grid(padding=(0, 1))
        longest = max([*seconds.values(), 1e-9])
        for stage in STAGES:
            if stage in seconds:
                width = max(1, round(20 * seconds[stage] / longest))
                bars.add_row(Text(stage), Text("█" * width, style="cyan"), Text(f"{seconds[stage]:.1f} s"))
        shown = Text(sample, overflow="ellipsis", no_wrap=True, style="dim")
        return Group(head, bars, shown)
