"""Groups without a learning signal: counted by reason, and too many in a row end the run."""

from dataclasses import dataclass, field

from rlkd.core.errors import DataError
from rlkd.train.health import PassRates


@dataclass
class TurnedAway:
    """How many groups were turned away since the last step, by reason: too many in a row end the run."""

    bound: int
    rates: PassRates  # of all groups since then, for advice
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, samples: int) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        total = sum(self.reasons.values())
        if total > self.bound:
            shares = ", ".join(f"{n / total:.0%} {why}" for why, n in sorted(self.reasons.items()))
            raise DataError(
                "RLKD-D020",
                f"no learning signal: {total} groups in a row were turned away ({shares})",
                where="schedule.max_turned_away",
                fix=self.rates.advice(samples),
            )

    def clear(self) -> None:
        self.reasons.clear()
        self.rates.clear()
