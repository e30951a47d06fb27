"""How old what is trained is: by how many optimizer steps its weights are behind those that learn from it."""

import math
from collections.abc import Sequence

from rlkd.core.errors import DivergedError
from rlkd.core.types import Group, Origin


def ages(groups: Sequence[Group], step: int) -> list[int]:
    """How many steps old each sample is that the policy had a part in, by its oldest token, when `step` steps are done.
    What somebody else wrote has no age."""
    written = [s for g in groups for s in g.samples if (s.origin == Origin.POLICY).any()]
    return [step - s.versions[0] for s in written]


def too_old(group: Group, step: int, bound: int) -> bool:
    """Whether the next step must not use it; `bound`: schedule.staleness."""
    return max(ages([group], step), default=0) > bound


def refuse(groups: Sequence[Group], step: int, bound: int) -> None:
    """Before step `step` + 1. The slots see to it that no group gets too old: DivergedError for one that did all the
    same (a worker with old weights, a bug), because what it would do to the weights cannot be taken back."""
    for group in groups:
        if too_old(group, step, bound):
            raise DivergedError(
                "RLKD-T146",
                f"step {step + 1}: an answer to prompt {group.prompt.id} was written with weights that are "
                f"{max(ages([group], step))} steps old; schedule.staleness={bound}",
                where="schedule.staleness",
                fix="report this; the same command begins at the checkpoint before",
            )


def metrics(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Of the groups that step `step` used; NaN for a step of demonstrations."""
    found: list[float] = [*ages(groups, step - 1)] or [math.nan]
    return {"staleness/mean": sum(found) / len(found), "staleness/max": float(max(found))}
