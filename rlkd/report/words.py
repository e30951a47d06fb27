"""What is said of a step, in words and bars; text without colours, as short pieces that fit any width."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlkd.report.secrets import without
from rlkd.report.summary import ordered

BLOCKS = " ▏▎▍▌▋▊▉█"
Row = Mapping[str, Any]


def headline(row: Row, first_reward: float | None, pass_at_1: float | None) -> list[str]:
    """The step's numbers, most telling first. The change of the reward is since the first step shown."""
    reward = known(row, "reward/mean")
    change = "" if reward is None or first_reward is None else f" ({reward - first_reward:+.2f})"
    pieces = [f"reward {number(reward, '.2f')}{change}"]
    if pass_at_1 is not None:
        pieces.append(f"pass@1 {pass_at_1:.2f}")
    for word in ("kl", "mismatch"):
        name = next((n for n in sorted(row) if n.startswith(word)), None)
        if name is not None:
            pieces.append(f"{word} {number(known(row, name), '.2g')}")
    pieces.append(f"len {number(known(row, 'length/mean'), '.0f')}")
    pieces.append(f"trunc {number(known(row, 'truncated'), '.0%')}")
    if row.get("unjudged"):
        pieces.append(f"unjudged {row['unjudged']:.0f}")
    pieces.append(f"{number(known(row, 'seconds/step'), '.1f')} s/step")
    return pieces


def stage_seconds(row: Row) -> dict[str, float]:
    """Seconds of each stage of the step, in the order in which they happen."""
    found = {n.removeprefix("seconds/"): v for n, v in row.items() if n.startswith("seconds/") and v is not None}
    return {stage: found[stage] for stage in ordered(found) if stage != "step"}


def stage_bars(row: Row, width: int = 8) -> list[str]:
    """One bar a stage, to the scale of the longest."""
    seconds = stage_seconds(row)
    longest = max([1e-9, *seconds.values()])
    return [f"{stage} {blocks(s / longest, width)} {s:.1f} s" for stage, s in seconds.items()]


def blocks(fraction: float, width: int) -> str:
    """A bar in eighths of a character; something above zero is never invisible."""
    eighths = max(1 if fraction > 0 else 0, round(min(1.0, fraction) * width * 8))
    return "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()


def progress_bar(done: int, of: int, width: int) -> str:
    halves = round(2 * width * min(1.0, done / max(1, of)))
    return ("━" * (halves // 2) + ("╸" if halves % 2 else "")).ljust(width, "─")


def sample_line(sample: Mapping[str, Any]) -> str:
    """`"12+7=?" → "19"  ✔ 1.00  adv +0.81`. The text is a model's: nothing in it reaches the terminal as a command."""
    advantage = "" if sample["advantage"] is None else f"  adv {sample['advantage']:+.2f}"
    mark = "✔" if sample["right"] else "✘"
    shown = f"{one_line(sample['question'], 200)} → {one_line(sample['answer'], 200)}"
    return f"{mark} {sample['reward']:.2f}{advantage}  {shown}"


def one_line(text: str, most: int) -> str:
    """Printable characters only, in quotes; the end is kept when it is too long, for that is where the answer is."""
    text = " ".join(without(text).split())
    text = "".join(c if c.isprintable() else "�" for c in text)
    return f'"{text}"' if len(text) <= most else f'"…{text[-most:]}"'


def flow(pieces: Sequence[str], width: int, indent: str = "") -> list[str]:
    """The pieces in as many lines as it takes; one that alone is too long is cut, with a mark."""
    lines: list[str] = []
    line = ""
    for piece in pieces:
        if line and len(line) + 2 + len(piece) > width:
            lines.append(line)
            line = ""
        line = f"{line}  {piece}" if line else indent + piece
    lines.append(line)
    return [text if len(text) <= width else text[: max(0, width - 1)] + "…" for text in lines if text]


def known(row: Row, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or math.isnan(value) else float(value)


def number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
