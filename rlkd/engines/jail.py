"""The verifiers' jail: rewards run in child processes that are interrupted, killed and replaced.

Threads and asyncio cannot stop a computation that holds the interpreter (reliability_ux.md M15); a process can be
killed. This is protection against accidents (endless sympy, segfaults, memory), not against malice: children have the
worker's rights and network.

A reward that runs code a model wrote (`runs_code`) is given the sandbox for it (sandbox.py), which is more, or the jail
does not start.

When a group fails, its answers are judged one by one, each failure ending its process; those that are fine are then
judged together once more, because a reward may compare answers. So one poisonous answer costs its siblings nothing,
and a reward that fails once by accident is retried.
"""

import queue
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlkd.core.types import Answer, Prompt
from rlkd.core.verdict import Failure, Outcome, Verdict
from rlkd.engines.cell import Cell, Scores
from rlkd.engines.keeper import Keeper

GIB = 1 << 30
SHORTEST_S = 1.0  # the least an answer gets when it is judged alone after its group ran out of time
SLACK_S = 10.0  # for starting and ending processes on a busy machine


class Jail:
    """`processes` children with the rewards loaded. Thread-safe: as many groups at once as there are children."""

    def __init__(
        self,
        rewards: bytes,
        processes: int = 1,
        timeout_s: float = 10.0,
        memory_gib: float = 2.0,
        grace_s: float = 2.0,
        start_s: float = 120.0,
        load: str = "rlkd.rewards.table:unpack",
        min_tier: str = "userns+landlock",
        accept_unsafe_code: bool = False,
        recheck_fraction: float = 0.0,
    ) -> None:
        """`rewards` is what `load` (`module:function`) turns into a mapping of name to Reward, in the keeper.
        `timeout_s` and `memory_gib` are for one group, in one child, beyond what it has when it starts; `grace_s` is
        the time between interrupting and killing it; `start_s` the most that loading the rewards may take.
        `min_tier` and `accept_unsafe_code` hold for rewards that run code (sandbox_rules.py). A share of
        `recheck_fraction` of the groups is judged a second time, in a fresh child.
        """
        self._recheck_fraction = recheck_fraction
        code = {"min_tier": min_tier, "accept_unsafe_code": accept_unsafe_code}
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._keeper = Keeper(rewards, load, int(memory_gib * GIB), start_s, code)
        self._cells = [Cell(self._keeper, grace_s) for _ in range(processes)]
        self._idle: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        for cell in self._cells:
            self._idle.put(cell)

    def start(self) -> tuple[str, ...]:
        """Starts everything; otherwise the first `score` does. Returns the rewards' names; DataError RLKD-D303 if they
        cannot be loaded, PreflightError RLKD-E310 if one runs code and the sandbox is not good enough."""
        self._keeper.start()
        for cell in self._cells:
            cell.open()
        return self._keeper.names

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict per answer. Waits for a free child, then takes at most `longest_s`."""
        if not answers:
            return []
        cell = self._idle.get()
        try:
            return self._judge(cell, prompt, answers)
        finally:
            self._idle.put(cell)

    @property
    def longest_s(self) -> float:
        """The most that judging one group can take, whatever its rewards do: whole, one by one, together again, and
        once more where groups are judged twice."""
        twice = self._timeout_s + self._grace_s if self._recheck_fraction else 0.0
        return 5 * self._timeout_s + 3 * self._grace_s + SLACK_S + twice

    @property
    def standing(self) -> Mapping[str, Any] | None:
        """Where rewards that run code run it: {tier, unsafe, reason}. None if there are none, or before `start`."""
        return self._keeper.standing

    def close(self) -> None:
        """Ends every child. Calls under way raise JailClosed."""
        self._keeper.close()

    def _judge(self, cell: Cell, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        whole = cell.call(prompt, answers, self._timeout_s)
        if not isinstance(whole, Failure):
            verdicts = _verdicts(whole, len(answers), retried=False)
            return self._again(cell, prompt, answers, verdicts) if self._chosen(prompt) else verdicts
        alone = self._one_by_one(cell, prompt, answers, whole)
        if len(answers) == 1:
            only = alone[0]
            return [Verdict(failure=only, retried=True)] if isinstance(only, Failure) else _verdicts(only, 1, True)
        fine = [i for i, result in enumerate(alone) if not isinstance(result, Failure)]
        together: Scores | Failure = {}
        if fine:
            together = cell.call(prompt, [answers[i] for i in fine], self._timeout_s)
        shared = together if isinstance(together, Failure) else None
        judged = [Verdict(failure=r if isinstance(r, Failure) else shared, retried=True) for r in alone]
        if not isinstance(together, Failure):
            for i, verdict in zip(fine, _verdicts(together, len(fine), retried=True), strict=True):
                judged[i] = verdict
        return judged

    def _chosen(self, prompt: Prompt) -> bool:
        """Whether this group is judged twice: the same ones in every run of the same recipe."""
        if not self._recheck_fraction:
            return False
        place = zlib.crc32(f"{prompt.id}:{prompt.seed}".encode("utf-8", "backslashreplace")) / (1 << 32)
        return place < self._recheck_fraction

    def _again(
        self, cell: Cell, prompt: Prompt, answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> list[Verdict]:
        """The verdicts, each with whether a second judging in a fresh child says the same; a failure does not."""
        cell.close()
        second = cell.call(prompt, answers, self._timeout_s)
        if isinstance(second, Failure):
            return [replace(v, agrees=False) for v in verdicts]
        others = _verdicts(second, len(answers), retried=False)
        return [replace(v, agrees=v.scores == o.scores) for v, o in zip(verdicts, others, strict=True)]

    def _one_by_one(
        self, cell: Cell, prompt: Prompt, answers: Sequence[Answer], whole: Failure
    ) -> list[Scores | Failure]:
        """Each answer alone. After a timeout each gets its fair share of the time; in all at most twice the group's,
        and what is not reached by then shares the group's failure."""
        share = self._timeout_s
        if whole.outcome is Outcome.TIMEOUT and len(answers) > 1:
            share = min(share, max(share / len(answers), SHORTEST_S))
        cell.open()  # a lost keeper's successor may load for long: that is not the answers' time
        until = time.monotonic() + 2 * self._timeout_s
        alone: list[Scores | Failure] = []
        for answer in answers:
            alone.append(cell.call(prompt, [answer], share) if time.monotonic() < until else whole)
        return alone


def _verdicts(scores: Scores, n: int, retried: bool) -> list[Verdict]:
    return [Verdict({name: values[i] for name, values in scores.items()}, retried=retried) for i in range(n)]
