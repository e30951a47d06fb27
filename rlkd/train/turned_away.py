"""Groups without a learning signal: counted by reason, and too many in a row end the run, or the wait for more."""

from dataclasses import dataclass, field

from rlkd.core.errors import DataError
from rlkd.train.health import PassRates


@dataclass
class TurnedAway:
    """How many groups were turned away since the last step, by reason. With `stop` too many in a row end the run; else
    the buffer sees to it that the step is made without waiting for more."""

    bound: int
    rates: PassRates  # of all groups since then, for advice
    stop: bool = True
    reasons: dict[str, int] = field(default_factory=dict)
    samples: int = 0  # that a prompt gets

    def add(self, reason: str, samples: int) -> None:
        """DataError if that is too many."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.samples = samples
        if self.stop and sum(self.reasons.values()) > self.bound:
            raise DataError(
                "RLKD-D020",
                f"no learning signal: {self._counted()}",
                where="schedule.max_turned_away",
                fix=self.rates.advice(samples),
            )

    def of_step(self, groups: int) -> str:
        """About a step that is made of so few groups, with advice."""
        what = f"made of {groups} groups" if groups else "without any: the weights stay as they are"
        return f"no learning signal: {self._counted()}; this step is {what}\n{self.rates.advice(self.samples)}"

    def _counted(self) -> str:
        total = sum(self.reasons.values())
        shares = ", ".join(f"{n / total:.0%} {why}" for why, n in sorted(self.reasons.items()))
        return f"{total} groups in a row were turned away ({shares})"

    def clear(self) -> None:
        self.reasons.clear()
        self.rates.clear()
