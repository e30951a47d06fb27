"""What one trial takes of the cluster: its own process and all actors of its run, in one placement group.

All of it or nothing: two trials that each hold half of what they need, and wait for the other half, cannot be.
"""

import math
from collections.abc import Sequence

import ray
from ray.tune import PlacementGroupFactory

from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.submit.needs import needs
from rlkd.workers.nodes import STABLE, alive
from rlkd.workers.placement import A_LITTLE, CPU_SHARE, Bundle, has_room

Resources = dict[str, float]


def group(stages: Sequence[Stage], at_once: int | None) -> PlacementGroupFactory:
    """The trial's own process first, then every actor of the stage that needs most. Ray must be there.

    Without GPUs all roles take turns on the same cores: the trial's process holds its share of them, one machine's, or
    of `at_once` trials an equal part of all."""
    gpu, stable = _gpu(stages), any(node.stable for node in alive())
    wanted = _together([_actors(stage.config, gpu, stable) for stage in stages])
    own = {"CPU": 1.0 if gpu else _left(wanted, at_once), **({STABLE: A_LITTLE} if stable else {})}
    shared = any(stage.config.sync.kind == "shm" for stage in stages)  # memory of one machine
    return PlacementGroupFactory([own, *wanted], strategy="STRICT_PACK" if shared else "PACK")


async def try_room(wanted: PlacementGroupFactory, wait_s: float) -> None:
    """PreflightError that says what is missing if the cluster has no room for one such trial: Tune waits in silence."""
    parts = [Bundle("trial" if not i else f"part-{i}", dict(b)) for i, b in enumerate(wanted.bundles)]
    await has_room(parts, wanted.strategy, wait_s)


def _gpu(stages: Sequence[Stage]) -> bool:
    found = ray.cluster_resources().get("GPU", 0) > 0
    return found and any(stage.config.model.device != "cpu" for stage in stages)


def _actors(config: Config, gpu: bool, stable: bool) -> list[Resources]:
    """One bundle per actor of a run; of rollout workers, those without which it does not begin."""
    return [dict(b.resources) for b in needs(config, gpu, stable)]


def _together(stages: Sequence[list[Resources]]) -> list[Resources]:
    """Bundles that every stage fits into: of several, sorted, the largest at each place."""
    if len(stages) == 1:
        return stages[0]
    stages = [sorted(stage, key=_size, reverse=True) for stage in stages]
    longest = max(map(len, stages))
    found: list[Resources] = []
    for i in range(longest):
        here = [stage[i] for stage in stages if i < len(stage)]
        kinds = {kind for one in here for kind in one}
        found.append({kind: max(one.get(kind, 0.0) for one in here) for kind in sorted(kinds)})
    return found


def _size(resources: Resources) -> tuple[float, float, float]:
    return resources.get(STABLE, 0.0), resources.get("GPU", 0.0), resources.get("CPU", 0.0)


def _left(wanted: Sequence[Resources], at_once: int | None) -> float:
    """Cores that the trial's own process holds beside its actors' shares."""
    cores = [node.total.get("CPU", 0.0) for node in alive()]
    each = min((c for c in cores if c > 0), default=1.0)
    share = each if at_once is None else min(each, sum(cores) / at_once)
    return max(CPU_SHARE, math.floor((share - sum(w["CPU"] for w in wanted)) * 1e4) / 1e4)
