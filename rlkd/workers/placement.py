"""Which resources a run asks of the Ray cluster, and where its actors go."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlkd.core.errors import PreflightError

CPU_SHARE = 0.1  # without GPUs the roles take turns on the same cores; workers/threads.py divides the real threads


@dataclass(frozen=True)
class Bundle:
    """One actor's resources."""

    role: str  # learner-0, rollout-1, reward-0, reference-0, …
    resources: Mapping[str, float]


def bundles(
    learner_ranks: int, rollout_workers: int, tensor_parallel: int, reward_workers: int, scorers: Mapping[str, int],
    gpu: bool, share_gpus: bool = False,
) -> list[Bundle]:  # fmt: skip
    """One bundle per actor, the learner first. With `share_gpus` sampler, learner and scorers use the same GPUs."""

    def device(gpus: float, share: float) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": share if share_gpus else gpus} if gpu else {"CPU": CPU_SHARE}

    counts = [(f"learner-{i}", device(1.0, 0.5)) for i in range(learner_ranks)]
    counts += [(f"rollout-{i}", device(float(tensor_parallel), 0.4)) for i in range(rollout_workers)]
    counts += [(f"{name}-{i}", device(1.0, 0.1)) for name, n in scorers.items() for i in range(n)]
    counts += [(f"reward-{i}", {"CPU": 1.0 if gpu else CPU_SHARE}) for i in range(reward_workers)]
    return [Bundle(role, resources) for role, resources in counts]


@dataclass(frozen=True)
class Placement:
    """A placement group with one bundle per role."""

    group: PlacementGroup
    bundles: tuple[Bundle, ...]
    leaving: set[str] = field(default_factory=set)  # nodes that go away

    def options(self, role: str) -> dict[str, Any]:
        """Ray actor options that put `role` into its bundle. While the bundle is on a node that goes away: anywhere,
        which is where Ray finds room on another node (it places nothing on a node that drains)."""
        index = next(i for i, b in enumerate(self.bundles) if b.role == role)
        resources = self.bundles[index].resources
        return {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "max_restarts": 0,  # Ray would restart an actor with its first weights; supervision is ours
            "scheduling_strategy": "DEFAULT" if self._leaves(index) else self._bundle(index),
        }

    def _bundle(self, index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)

    def _leaves(self, index: int) -> bool:
        if not self.leaving:
            return False
        return placement_group_table(self.group)["bundles_to_node_id"].get(index) in self.leaving

    def leave(self, node: str) -> None:
        """From now on put nobody on this node."""
        self.leaving.add(node)

    def release(self) -> None:
        remove_placement_group(self.group)


async def reserve(wanted: list[Bundle], wait_s: float) -> Placement:
    """Reserve all bundles at once, or raise PreflightError that says what is missing after at most `wait_s` seconds."""
    group = placement_group([dict(b.resources) for b in wanted], strategy="PACK")
    try:
        async with asyncio.timeout(wait_s):
            await asyncio.wrap_future(group.ready().future())
    except TimeoutError:
        remove_placement_group(group)
        raise PreflightError(
            "RLKD-E020",
            f"the cluster cannot place this run: {_missing(wanted)}",
            where="ray",
            fix="ask for fewer workers or ranks, or add nodes; `ray status` shows what is in use",
        ) from None
    return Placement(group, tuple(wanted))


def _missing(wanted: list[Bundle]) -> str:
    """What the run needs beside what is free now, and the largest node."""
    free = ray.available_resources()
    parts = []
    for kind in ("CPU", "GPU"):
        need = sum(b.resources.get(kind, 0.0) for b in wanted)
        if need:
            nodes = [n["Resources"].get(kind, 0.0) for n in ray.nodes() if n["Alive"]]
            parts.append(
                f"{need:g} {kind} needed, {free.get(kind, 0.0):g} free, largest node has {max(nodes, default=0):g}"
            )
    return "; ".join(parts)
