"""Which checkpoints stay. The newest two always do, whatever the settings say."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

AT_LEAST = 2  # whole ones that are never deleted: one may turn out to be damaged


@dataclass(frozen=True)
class Keep:
    last: int = 2  # the newest; never fewer than 2
    every: int = 0  # and each whose step is a multiple of this; 0: none
    best: int = 0  # and as many with the highest score; those without a score never count

    @property
    def newest(self) -> int:
        return max(self.last, AT_LEAST)


def special(scores: Mapping[int, float | None], keep: Keep, pinned: Collection[int]) -> set[int]:
    """Steps that stay though they are not among the newest: pinned, a multiple, or one of the best (the newer of two
    with the same score)."""
    ranked = sorted((score, step) for step, score in scores.items() if score is not None)
    best = {step for _, step in ranked[-keep.best :]} if keep.best else set()
    multiples = {step for step in scores if keep.every and step % keep.every == 0}
    return (best | multiples | set(pinned)) & scores.keys()
