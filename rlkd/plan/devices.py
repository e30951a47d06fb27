"""How many devices a recipe takes, and how it could use another number of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlkd.config.schema import Config
from rlkd.plan.hardware import Hardware
from rlkd.plan.work import scorers, writers

Changes = Mapping[str, Any]  # dotted key → value, as on the command line


@dataclass(frozen=True)
class Devices:
    """By role; a role on a GPU of its own has one a worker. As rlkd/workers/placement.py reserves them."""

    learner: int
    rollout: int
    others: Mapping[str, int]  # scorers and writers
    shared: bool  # all roles on the same GPUs, each with a share
    per_node: int

    @property
    def total(self) -> int:
        if self.shared:
            return max(self.learner, self.rollout, *self.others.values(), 1)
        return self.learner + self.rollout + sum(self.others.values())

    @property
    def nodes(self) -> int:
        return -(-self.total // self.per_node)


def devices(config: Config, hardware: Hardware) -> Devices:
    """GPUs of the recipe; on a CPU one device, the machine."""
    if not hardware.gpu:
        return Devices(1, 1, {}, True, 1)
    others = {**scorers(config), **{f"writer:{name}": n for name, n in writers(config).items()}}
    rollout = config.sampler.workers * config.sampler.tensor_parallel
    return Devices(config.learner.ranks, rollout, others, config.ray.share_gpus, hardware.per_node)


def changed(config: Config, changes: Changes) -> Config:
    """The recipe with these settings."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def splits(config: Config, gpus: int, tensors: int) -> Iterator[Changes]:
    """Ways to use exactly so many GPUs: learner ranks and rollout workers apart, and on the same ones; a rollout worker
    has `tensors` of them, and shares only one. Only what differs from the recipe is named."""
    others = sum(scorers(config).values()) + sum(writers(config).values())
    for workers in _some((gpus - others - 1) // tensors):
        yield _differing(config, gpus - others - workers * tensors, workers, tensors, False)
    if tensors == 1:
        yield _differing(config, gpus, gpus, 1, True)


def _some(most: int) -> list[int]:
    """1 … most, thinned out where there are many: 32 at most for a factor of two."""
    found = list(range(1, min(most, 32) + 1))
    while found and found[-1] * 33 // 32 + 1 <= most:
        found.append(found[-1] * 33 // 32 + 1)
    return found


def _differing(config: Config, ranks: int, workers: int, tensors: int, shared: bool) -> Changes:
    wanted = {
        "learner.ranks": (ranks, config.learner.ranks),
        "sampler.workers": (workers, config.sampler.workers),
        "sampler.tensor_parallel": (tensors, config.sampler.tensor_parallel),
        "ray.share_gpus": (shared, config.ray.share_gpus),
    }
    return {key: new for key, (new, old) in wanted.items() if new != old}
