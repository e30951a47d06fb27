"""Prompts that are neither too easy nor too hard: those outside a band of pass rates are passed over for a while."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlkd.core.errors import CheckpointError, ConfigError
from rlkd.core.types import Group, Prompt
from rlkd.curriculum.uniform import Uniform


@dataclass(frozen=True)
class Band:
    """Which prompts are worth a group. A prompt's pass rate is a running mean over its groups.

    Raises ConfigError for bounds that make no sense.
    """

    low: float = 0.05  # a prompt below is too hard for now
    high: float = 0.95  # a prompt above is too easy
    success: float = 0.5  # a reward above this is a pass
    recent: float = 0.5  # weight of the newest group in the running mean
    again: int = 4  # a prompt outside the band is tried again this many epochs after its last try

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high <= 1 and 0 < self.recent <= 1 and self.again >= 1):
            raise ConfigError(
                "RLKD-C408",
                f"the band makes no sense: {self}",
                where="curriculum",
                fix="0 ≤ low ≤ high ≤ 1, 0 < recent ≤ 1, again ≥ 1",
            )


@dataclass(frozen=True)
class Record:
    """What is known of one prompt."""

    rate: float  # running pass rate, 0 … 1
    epoch: int  # of the newest try


class Difficulty(Uniform):
    """Uniform's order, less the prompts outside the band. A prompt nobody has tried yet counts as inside.

    When a whole epoch's worth of prompts in a row is outside, the next one is drawn all the same: `draw` always ends.
    `passed_over` counts the places that were not drawn. Which ones are depends on the pass rates known at that moment,
    so it may differ from run to run when several groups are under way; the seeds of what is drawn do not.
    """

    kind = "difficulty"

    def __init__(self, prompts: Sequence[Prompt], fingerprint: str, seed: int, band: Band | None = None) -> None:
        super().__init__(prompts, fingerprint, seed)
        self.band = band or Band()
        self.passed_over = 0
        self.records: dict[int, Record] = {}  # by the prompt's index
        self._index = {prompt.id: i for i, prompt in enumerate(self.prompts)}

        if len(self._index) < len(self.prompts):
            raise ValueError("prompts share an id: their pass rates could not be told apart")

    def draw(self) -> Prompt:
        for _ in self.prompts:
            epoch = self.epoch
            index, seed = self._next()
            if self._wanted(index, epoch):
                return replace(self.prompts[index], seed=seed)
            self.passed_over += 1
        return super().draw()

    def observe(self, group: Group) -> None:
        """Takes the policy's own judged samples into the pass rate; a group without any teaches nothing."""
        passes = [s.reward > self.band.success for s in group.own if not math.isnan(s.reward)]
        if passes:
            index = self._index[group.prompt.id]
            rate = sum(passes) / len(passes)
            if index in self.records:
                rate = self.band.recent * rate + (1 - self.band.recent) * self.records[index].rate
            self.records[index] = Record(rate, self.epoch)

    def state_dict(self) -> dict[str, Any]:
        records = {str(index): [record.rate, record.epoch] for index, record in self.records.items()}
        return {**super().state_dict(), "passed_over": self.passed_over, "records": records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check(state)
        try:
            records = {int(index): Record(float(rate), int(epoch)) for index, (rate, epoch) in state["records"].items()}
            passed_over = int(state["passed_over"])
            if not all(0 <= i < len(self.prompts) and 0 <= record.rate <= 1 for i, record in records.items()):
                raise ValueError("a prompt's number or a rate is out of range")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                "RLKD-K103",
                f"the checkpoint's pass rates cannot be read: {error!r}",
                where="curriculum",
                fix="move this checkpoint away to use the one before it",
            ) from error
        self.cursor, self.passed_over, self.records = state["cursor"], passed_over, records

    def _wanted(self, index: int, epoch: int) -> bool:
        record = self.records.get(index)
        if record is None or self.band.low <= record.rate <= self.band.high:
            return True
        return epoch - record.epoch >= self.band.again
