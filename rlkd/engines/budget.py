"""What an endpoint may cost over the whole run, resumed attempts included, and what it has cost so far.

A request is put into the account before it is sent, at the most it can cost, and at what it did cost when the answer
says so. So requests under way together never go over the budget, and a program that is killed has counted too much
rather than too little. What was not said is estimated at the most it can have been, and told once.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlkd.core.errors import BudgetReached, PreflightError

MILLION = 1_000_000
Report = Callable[[str, str], None]


@dataclass(frozen=True)
class Limits:
    """None: no limit. Prices are per million tokens, the cost is in their currency."""

    max_total_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    @property
    def any(self) -> bool:
        return self.max_total_tokens is not None or self.max_cost is not None

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / MILLION


@dataclass(frozen=True)
class Spent:
    """Of the whole run. Tokens and cost include the estimates for `unknown` requests."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    unknown: int = 0  # requests whose usage nobody said

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out

    def plus(self, requests: int, tokens_in: int, tokens_out: int, cost: float, unknown: int = 0) -> "Spent":
        return Spent(
            self.requests + requests,
            self.tokens_in + tokens_in,
            self.tokens_out + tokens_out,
            self.cost + cost,
            self.unknown + unknown,
        )


@dataclass(eq=False)
class Bill:
    """One request. Whoever sends it says what became of it; unsaid, it counts as the most it can have cost."""

    most_in: int
    most_out: int
    used: tuple[int, int] | None = None  # tokens in and out, as the server says

    def paid(self, tokens_in: int, tokens_out: int) -> None:
        self.used = (tokens_in, tokens_out)

    def free(self) -> None:
        """The server did no work for it: it was refused, or never got there."""
        self.used = (0, 0)


@dataclass
class Budget:
    """The account of one endpoint, kept in `path` (None: nowhere). PreflightError if the file cannot be read."""

    name: str
    limits: Limits = field(default_factory=Limits)
    path: Path | None = None
    report: Report = lambda *_: None

    def __post_init__(self) -> None:
        self.spent = self._read()
        self._under_way: list[Bill] = []
        self._settled = asyncio.Event()
        self._told: set[str] = set()

    @asynccontextmanager
    async def request(self, most_in: int, most_out: int) -> AsyncIterator[Bill]:
        """One request of at most so many tokens. Waits while those under way might use the rest up; BudgetReached
        when what is left is not enough and nothing is under way."""
        bill = Bill(most_in, most_out)
        while (short := self._short_of(bill)) is not None:
            if not self._under_way:
                raise self._reached(short)
            await self._settled.wait()
        self._under_way.append(bill)
        self._write()
        try:
            yield bill
        finally:
            self._settle(bill)

    def check(self) -> None:
        """BudgetReached if nothing is left, before anything is started."""
        if (short := self._short_of(Bill(0, 0))) is not None:
            raise self._reached(short)

    def _short_of(self, bill: Bill) -> str | None:
        """The limit that this request might break; None if it fits beside what is spent and under way."""
        then = self._worst(self.spent, [*self._under_way, bill])
        most, cost = self.limits.max_total_tokens, self.limits.max_cost
        empty = bill.most_in == bill.most_out == 0
        if most is not None and (then.tokens > most or (empty and then.tokens >= most)):
            return f"{self.spent.tokens:,} of {most:,} tokens are spent (max_total_tokens)"
        if cost is not None and (then.cost > cost or (empty and then.cost >= cost)):
            return f"{self.spent.cost:,.4g} of {cost:,.4g} are spent (max_cost)"
        return None

    def _worst(self, spent: Spent, bills: list[Bill]) -> Spent:
        for b in bills:
            spent = spent.plus(1, b.most_in, b.most_out, self.limits.cost(b.most_in, b.most_out), 1)
        return spent

    def _settle(self, bill: Bill) -> None:
        self._under_way.remove(bill)
        if bill.used is None:
            self.spent = self._worst(self.spent, [bill])
            if self.limits.any:
                self._tell_once(
                    "budget",
                    f"{self.name}: an answer did not come, or did not say how many tokens it used; the budget counts "
                    "the most that such requests can have used",
                )
        else:
            self.spent = self.spent.plus(int(bill.used != (0, 0)), *bill.used, self.limits.cost(*bill.used))
        self._write()
        self._settled.set()
        self._settled = asyncio.Event()

    def _reached(self, short: str) -> BudgetReached:
        return BudgetReached(
            "RLKD-I720",
            f"the budget of {self.name} is reached: {short}, and the next request might need more than is left",
            where=f"{self.name}.endpoint",
            fix="raise it and give the same command: the run continues from its last whole step, which was saved",
        )

    # --- the file

    def _read(self) -> Spent:
        if self.path is None or not self.path.exists():
            return Spent()
        try:
            return Spent(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise PreflightError(
                "RLKD-E721",
                f"what {self.name} has cost so far cannot be read: {error}",
                where=str(self.path),
                fix=f"mend it (json: {', '.join(asdict(Spent()))}), or delete it to count from 0",
            ) from error

    def _write(self) -> None:
        """With what is under way at its worst, for a program that is killed now."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._worst(self.spent, self._under_way))), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            self._tell_once(
                "warning", f"{self.path}: {error.strerror}: what {self.name} costs is counted in memory only"
            )

    def _tell_once(self, kind: str, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.report(kind, text)


def most_tokens(text: str) -> int:
    """At least as many tokens as any tokenizer makes of it: none makes more than one a byte."""
    return len(text.encode("utf-8", "replace"))
