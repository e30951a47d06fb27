"""What each actor of a run asks of the cluster, and who shares a GPU (ray.share_gpus)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlkd.workers.nodes import STABLE

CPU_SHARE = 0.1  # without GPUs the roles take turns on the same cores; workers/threads.py divides the real threads
A_LITTLE = 0.001  # of the resource that marks a node: enough for a thousand ranks on one
SMALLEST = 10_000  # parts that Ray divides a resource into


@dataclass(frozen=True)
class Bundle:
    """One actor's resources."""

    role: str  # learner-0, rollout-1, reward-0, reference-0, …
    resources: Mapping[str, float]

    @property
    def learner(self) -> bool:
        return self.role.startswith("learner-")


def bundles(
    learner_ranks: int, rollout_workers: int, tensor_parallel: int, reward_workers: int, scorers: Mapping[str, int],
    gpu: bool, share_gpus: bool = False, stable: bool = False,
) -> list[Bundle]:  # fmt: skip
    """One bundle per actor, the learner first. With `share_gpus` sampler, learner and scorers use the same GPUs; with
    `stable` the learner asks for nodes that stay."""
    learns, writes, scores = shares(len(scorers))

    def device(gpus: float, share: float) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": share if share_gpus else gpus} if gpu else {"CPU": CPU_SHARE}

    stays = {STABLE: A_LITTLE} if stable else {}
    counts = [(f"learner-{i}", {**device(1.0, learns), **stays}) for i in range(learner_ranks)]
    counts += [(f"rollout-{i}", device(float(tensor_parallel), writes)) for i in range(rollout_workers)]
    counts += [(f"{name}-{i}", device(1.0, scores)) for name, n in scorers.items() for i in range(n)]
    counts += [(f"reward-{i}", {"CPU": 1.0 if gpu else CPU_SHARE}) for i in range(reward_workers)]
    return [Bundle(role, resources) for role, resources in counts]


def shares(scorers: int) -> tuple[float, float, float]:
    """Parts of one GPU for a learner rank, a rollout worker and a scorer of so many roles: together one GPU, and never
    room for two ranks, or for two rollout workers beside one."""
    if not scorers:
        return 0.6, 0.4, 0.0
    return 0.6, 0.25, math.floor(0.15 / scorers * SMALLEST) / SMALLEST


def side_by_side(wanted: Sequence[Bundle]) -> list[list[Bundle]]:
    """Who shares a GPU: those of the same number, the learner's ranks first. Who needs none is left out.

    Left to Ray, parts of a GPU go where the least is left that is enough: two ranks on one GPU, none on the other.
    """
    numbers: dict[int, list[Bundle]] = {}
    for bundle in wanted:
        if "GPU" in bundle.resources:
            numbers.setdefault(int(bundle.role.rpartition("-")[2]), []).append(bundle)
    return [numbers[number] for number in sorted(numbers)]


def as_one(bundles: Sequence[Bundle]) -> Bundle:
    """Room for all of them: a whole GPU, so that nobody else is on it."""
    kinds = dict.fromkeys(kind for b in bundles for kind in b.resources)
    needs = {kind: sum(b.resources.get(kind, 0.0) for b in bundles) for kind in kinds}
    return Bundle(bundles[0].role, {**needs, "GPU": 1.0})
