"""What the terminal shows while a run goes on: a live picture on a terminal, one line a step elsewhere.

All of it goes to stderr; stdout is for results. A terminal that goes away does not end the run.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlkd.report import words
from rlkd.report.secrets import without


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the program here, and close stdout."""
        raise BrokenPipeError


class Progress:
    """Shows steps as they come, on `stream`, a text file (None: stderr).

    `live=None`: live if stdout and stderr are terminals that can.
    """

    def __init__(self, steps: int, stream: Any = None, live: bool | None = None) -> None:
        self.steps = steps
        self.first_reward: float | None = None
        self.pass_at_1: float | None = None
        self.finished = 0  # groups since the last step
        self._stream = stream or sys.stderr
        self._row: Mapping[str, Any] = {}
        self._sample: Mapping[str, Any] | None = None
        self._gone = False
        self._live: Live | None = None
        self._console = _Console(file=self._stream, highlight=False, markup=False, emoji=False)
        if _capable(self._stream) if live is None else live:
            self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=2)
            self._safely(self._live.start)

    def say(self, text: str, style: str = "") -> None:
        """A line that stays, above the live picture."""
        text = without(text)
        if self._live is None:
            self._safely(lambda: print(text, file=self._stream, flush=True))
        else:
            self._safely(lambda: self._console.print(Text(text, style=style), soft_wrap=True))

    def group(self) -> None:
        """A group is finished."""
        self.finished += 1

    def step(self, row: Mapping[str, Any], sample: Mapping[str, Any] | None = None) -> None:
        """A step is done: its row of metrics, and one sample to look at (samples.one_line)."""
        self._row, self._sample, self.finished = row, sample, 0
        if self.first_reward is None:
            self.first_reward = words.known(row, "reward/mean")
        if self._live is None:
            seconds = " ".join(f"{stage} {s:.1f}" for stage, s in words.stage_seconds(row).items())
            self.say("  ".join([f"step {row['step']}/{self.steps}", *self._headline(), seconds]).rstrip())

    def evaluated(self, pass_at_1: float) -> None:
        """The newest held-out pass@1."""
        self.pass_at_1 = pass_at_1

    def close(self) -> None:
        """The last picture stays; more can be said."""
        if self._live is not None:
            self._safely(self._live.stop)
            self._live = None

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 if it is none."""
        return self._console.width

    def _headline(self) -> list[str]:
        return words.headline(self._row, self.first_reward, self.pass_at_1)

    def _picture(self) -> Text:
        width = self._console.width
        done = self._row.get("step", 0)
        pieces = [f"step {done:>{len(str(self.steps))}}/{self.steps}"]
        if width >= 60:
            pieces.append(words.progress_bar(done, self.steps, 20))
        if self._row:
            pieces += self._headline()
        if self.finished:
            pieces.append(f"next: {self.finished} groups")
        lines = [*words.flow(pieces, width), *words.flow(words.stage_bars(self._row), width, "  ")]
        text = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
        if self._sample is not None:
            sample = Text(f"  sample  {words.sample_line(self._sample)}", style="dim", end="")
            sample.truncate(width, overflow="ellipsis")
            text.append("\n").append_text(sample)
        return text

    def _safely(self, show: Callable[[], object]) -> None:
        """Show something, unless the terminal has gone (closed window, broken pipe): then nothing is shown any more."""
        if self._gone:
            return
        try:
            show()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._gone = True
            if self._live is not None:
                with suppress(OSError, ValueError):
                    self._live.stop()  # gives stdout and stderr back, even if it cannot draw any more


def _capable(stream: Any) -> bool:
    """Whether a live picture can be drawn: on a terminal that moves its cursor, with stdout on a terminal too."""
    return stream.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
