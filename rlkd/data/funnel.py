"""What became of the rows: how many were read, usable, short enough, and why the others were not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlkd.core.errors import DataError, Problem
from rlkd.data.rows import BadRow

LISTED = 20  # bad rows named in an error


@dataclass(frozen=True)
class TooLong:
    where: str
    tokens: int


@dataclass(frozen=True)
class TakenId:
    """A row whose id an earlier row has."""

    id: str
    first: str  # where it was first
    where: str


@dataclass(frozen=True)
class Funnel:
    """`read ≥ valid ≥ fit`. `bad` and `long` hold the first LISTED examples. Lengths are those of valid prompts."""

    read: int
    valid: int
    fit: int
    limit: int  # tokens
    shortest: int | None  # None: no valid prompt
    longest: int | None
    reasons: Mapping[str, int]  # of the bad rows, how many of each kind
    examples: Mapping[str, BadRow]  # the first of each kind
    bad: tuple[BadRow, ...] = ()
    long: tuple[TooLong, ...] = ()  # left out
    cut: int = 0  # of those that fit: cut on the left to do so
    first_cut: TooLong | None = None
    demonstrations: int = 0  # worked answers, of prompts that fit
    helped: int = 0  # prompts with at least one

    def __str__(self) -> str:
        """7,473 rows → 7,470 valid → 0 within 64 prompt tokens (shortest is 71)"""
        text = self._prompts()
        if self.demonstrations:
            text += f"\n{counted(self.demonstrations, 'demonstration')} of {self.helped:,} of {self.fit:,} prompts"
        return text

    def _prompts(self) -> str:
        text = f"{self.read:,} rows → {self.valid:,} valid → {self.fit:,} within {self.limit:,} prompt tokens"
        if self.shortest is None:
            return text
        return text + (f" (longest is {self.longest:,})" if self.fit else f" (shortest is {self.shortest:,})")

    def lines(self) -> list[str]:
        """What was left out, each reason with its count and first example."""
        said = []
        for reason, count in self.reasons.items():
            bad = self.examples[reason]
            said.append(f"{counted(count, 'row')} left out: {reason}, as {bad.where}: {bad.what}")
        if self.first_cut is not None:
            first = f"as {self.first_cut.where} of {self.first_cut.tokens:,}"
            said.append(f"{counted(self.cut, 'prompt')} over {self.limit:,} tokens cut on the left, {first}")
        if self.long:
            first = f"as {self.long[0].where} of {self.long[0].tokens:,}"
            said.append(f"{counted(self.valid - self.fit, 'prompt')} over {self.limit:,} tokens left out, {first}")
        return said


@dataclass
class Tally:
    """Counts as rows come by, and becomes a Funnel."""

    limit: int
    read: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, BadRow] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    long: list[TooLong] = field(default_factory=list)
    cut: int = 0
    first_cut: TooLong | None = None

    def reject(self, row: BadRow) -> None:
        self.reasons[row.reason] += 1
        self.examples.setdefault(row.reason, row)
        if len(self.bad) < LISTED:
            self.bad.append(row)

    def measure(self, tokens: int) -> bool:
        """Whether a prompt of this length fits."""
        self.lengths[tokens] += 1
        return tokens <= self.limit

    def is_long(self, where: str, tokens: int, cut: bool) -> None:
        """A prompt that does not fit: it was cut, or is left out."""
        if cut:
            self.cut += 1
            self.first_cut = self.first_cut or TooLong(where, tokens)
        elif len(self.long) < LISTED:
            self.long.append(TooLong(where, tokens))

    def funnel(self) -> Funnel:
        return Funnel(
            read=self.read,
            valid=self.lengths.total(),
            fit=self.cut + sum(count for tokens, count in self.lengths.items() if tokens <= self.limit),
            limit=self.limit,
            shortest=min(self.lengths, default=None),
            longest=max(self.lengths, default=None),
            reasons=dict(self.reasons),
            examples=dict(self.examples),
            bad=tuple(self.bad),
            long=tuple(self.long),
            cut=self.cut,
            first_cut=self.first_cut,
        )


def counted(n: int, noun: str) -> str:
    """1 row, 2,000 rows"""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def rows_error(funnel: Funnel, taken: Sequence[TakenId], where: str, share: float) -> DataError | None:
    """Taken ids and, if they are more than this share of all rows, bad rows; the first LISTED of each by name. None:
    all is well."""
    problems = [*_bad_rows(funnel, where, share), *_taken_ids(taken, where)]
    return _error(problems) if problems else None


def _bad_rows(funnel: Funnel, where: str, share: float) -> list[Problem]:
    count = sum(funnel.reasons.values())
    if count <= share * funnel.read:
        return []
    kinds = ", ".join(f"{n:,} {reason}" for reason, n in funnel.reasons.items())
    listed = f"; the first {LISTED} follow" if count > LISTED else ""
    head = Problem(
        "RLKD-D110",
        f"of {counted(funnel.read, 'row')} {count:,} cannot be used ({kinds}){listed}",
        where,
        f"is it the right file? over {share:.0%} are not left out; mend them, or raise data.max_bad_fraction"
        if share
        else "mend them, or leave them out with data.bad_rows=drop",
    )
    rows = [Problem("RLKD-D111", bad.what, bad.where, bad.fix) for bad in funnel.bad]
    return [head, *rows]


def _taken_ids(taken: Sequence[TakenId], where: str) -> list[Problem]:
    if not taken:
        return []
    listed = f"; the first {LISTED} follow" if len(taken) > LISTED else ""
    head = Problem(
        "RLKD-D116", f"{counted(len(taken), 'row')} with an id that is taken{listed}", where, "ids must differ"
    )
    rows = [Problem("RLKD-D117", f"id {again.id!r} is already at {again.first}", again.where) for again in taken]
    return [head, *rows[:LISTED]]


def too_long_error(funnel: Funnel, where: str) -> DataError:
    count = funnel.valid - funnel.fit
    listed = f"; the first {LISTED} follow" if count > LISTED else ""
    head = Problem(
        "RLKD-D112",
        f"of {counted(funnel.valid, 'prompt')} {count:,} over {counted(funnel.limit, 'token')}{listed}",
        where,
        f"raise data.max_prompt_tokens (longest is {funnel.longest:,}), or leave them out with data.too_long=drop",
    )
    return _error([head, *(Problem("RLKD-D113", counted(long.tokens, "token"), long.where) for long in funnel.long)])


def empty_error(funnel: Funnel, where: str) -> DataError:
    """No prompt is left; says at which stage they went."""
    if funnel.read == 0:
        return DataError("RLKD-D114", "the dataset is empty: it has no rows", where, "give a source with rows in it")
    fix = (
        "mend the rows: " + "; ".join(funnel.lines())
        if funnel.valid == 0
        else f"raise data.max_prompt_tokens to at least {funnel.shortest:,}, or the model's context"
    )
    return DataError("RLKD-D115", f"no prompt is left: {funnel}", where, fix)


def _error(problems: Sequence[Problem]) -> DataError:
    error = DataError.of(problems)
    assert isinstance(error, DataError)
    return error
