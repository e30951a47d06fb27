"""What values each number may have, alone. What contradicts what is in contradictions.py."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """`at_least` ≤ x or `above` < x, and x ≤ `at_most` or x < `below`. What is infinite or NaN is never inside."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def __contains__(self, x: int | float) -> bool:
        return (
            math.isfinite(x)
            and (self.at_least is None or x >= self.at_least)
            and (self.above is None or x > self.above)
            and (self.at_most is None or x <= self.at_most)
            and (self.below is None or x < self.below)
        )

    @property
    def example(self) -> int | float | None:
        """A number that is in it, if there is an obvious one."""
        return self.at_least if self.at_least is not None else self.at_most

    def __str__(self) -> str:
        low = f"at least {self.at_least}" if self.at_least is not None else f"above {self.above}"
        high = f"at most {self.at_most}" if self.at_most is not None else f"below {self.below}"
        has_low = self.at_least is not None or self.above is not None
        has_high = self.at_most is not None or self.below is not None
        return " and ".join([low] * has_low + [high] * has_high) or "a finite number"


COUNT, NOT_NEGATIVE, POSITIVE = Range(at_least=1), Range(at_least=0), Range(above=0)
SHARE, SEED = Range(at_least=0, at_most=1), Range(at_least=0, below=2**63)

SOURCE = {"size": COUNT, "seed": SEED}
SCORER = {"workers": COUNT, "max_tokens": COUNT, "timeout_s": POSITIVE, "stall_s": POSITIVE, "threads": COUNT}
TEACHER: Mapping[str, Range] = {
    **SCORER,
    "writer.max_tokens": COUNT,
    "writer.context": Range(at_least=2),
    "writer.temperature": NOT_NEGATIVE,
    "writer.top_p": Range(above=0, at_most=1),
    "writer.max_num_seqs": COUNT,
    "writer.kv_cache_gib": POSITIVE,
    "writer.gpu_memory_utilization": Range(above=0, at_most=1),
    "endpoint.requests_per_minute": POSITIVE,
    "endpoint.at_once": COUNT,
    "endpoint.retries": NOT_NEGATIVE,
    "endpoint.timeout_s": POSITIVE,
    "endpoint.max_total_tokens": COUNT,
    "endpoint.max_cost": POSITIVE,
    "endpoint.price_in": NOT_NEGATIVE,
    "endpoint.price_out": NOT_NEGATIVE,
}
RANGES: Mapping[str, Range] = {
    "seed": SEED,
    "model.context": Range(at_least=2),  # one token of a prompt, one of an answer
    "data.max_prompt_tokens": COUNT,
    "data.max_bad_fraction": SHARE,
    "schedule.steps": COUNT,
    "schedule.groups_per_step": COUNT,
    "schedule.staleness": NOT_NEGATIVE,
    "schedule.max_turned_away": COUNT,
    "schedule.max_retries": NOT_NEGATIVE,
    "schedule.stall_s": POSITIVE,
    "curriculum.low": SHARE,
    "curriculum.high": SHARE,
    "curriculum.recent": Range(above=0, at_most=1),
    "curriculum.again": COUNT,
    "sampler.workers": COUNT,
    "sampler.min_workers": COUNT,
    "sampler.max_workers": COUNT,
    "sampler.max_tokens": COUNT,
    "sampler.min_tokens": NOT_NEGATIVE,
    "sampler.temperature": POSITIVE,
    "sampler.top_p": Range(above=0, at_most=1),
    "sampler.max_num_seqs": COUNT,
    "sampler.tensor_parallel": COUNT,
    "sampler.kv_cache_gib": POSITIVE,
    "sampler.gpu_memory_utilization": Range(above=0, at_most=1),
    "sampler.block_size": COUNT,
    "sampler.timeout_s": POSITIVE,
    "sampler.stall_s": POSITIVE,
    "sampler.hedge": Range(at_least=1),
    "sampler.min_workers_timeout_s": POSITIVE,
    "sampler.replacements": NOT_NEGATIVE,
    "sampler.replacements_in_10_min": NOT_NEGATIVE,
    "sampler.threads": COUNT,
    "verifier.workers": COUNT,
    "verifier.processes": COUNT,
    "verifier.timeout_s": POSITIVE,
    "verifier.memory_gib": POSITIVE,
    "verifier.max_error_fraction": SHARE,
    "verifier.recheck_fraction": SHARE,
    "learner.ranks": COUNT,
    "learner.lr": POSITIVE,  # 0 would train nothing
    "learner.betas": Range(at_least=0, below=1),
    "learner.weight_decay": NOT_NEGATIVE,
    "learner.warmup_steps": NOT_NEGATIVE,
    "learner.max_grad_norm": POSITIVE,
    "learner.max_tokens": Range(at_least=2),
    "learner.head_rows": COUNT,
    "learner.max_restarts": NOT_NEGATIVE,
    "learner.timeout_s": POSITIVE,
    "learner.threads": COUNT,
    "learner.max_nonfinite": COUNT,
    "sync.timeout_s": POSITIVE,
    "evaluate.every": NOT_NEGATIVE,
    "evaluate.prompts": COUNT,
    "evaluate.samples": COUNT,
    "evaluate.k": COUNT,
    "evaluate.temperature": NOT_NEGATIVE,
    "evaluate.top_p": Range(above=0, at_most=1),
    "evaluate.success": Range(),
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.between_failures_s": POSITIVE,
    "checkpoint.keep": Range(at_least=2),  # the newest may turn out to be damaged
    "checkpoint.keep_every": NOT_NEGATIVE,
    "checkpoint.keep_best": NOT_NEGATIVE,
    "checkpoint.upload_wait_s": NOT_NEGATIVE,
    "checkpoint.max_failed_saves": COUNT,
    "preempt.poll_s": POSITIVE,
    "preempt.coalesce_s": NOT_NEGATIVE,
    "preempt.grace_s": POSITIVE,
    "preempt.margin_s": NOT_NEGATIVE,
    "preempt.lease_s": Range(at_least=1),
    "health.canary_every": NOT_NEGATIVE,
    "health.canary": NOT_NEGATIVE,
    "health.mismatch_warn": NOT_NEGATIVE,
    "health.mismatch_stop": NOT_NEGATIVE,
    "health.length_growth": NOT_NEGATIVE,
    "health.entropy_share": SHARE,
    "health.repetition": SHARE,
    "health.truncated": SHARE,
    "report.samples_per_step": NOT_NEGATIVE,
    "ray.object_store_gib": Range(at_least=0.1),  # Ray asks for 75 MiB
    "ray.wait_s": NOT_NEGATIVE,
    **{f"data.train.{key}": r for key, r in SOURCE.items()},
    **{f"data.holdout.{key}": r for key, r in SOURCE.items()},
    **{f"reference.{key}": r for key, r in SCORER.items()},
}


def outside(config: Any) -> Iterator[tuple[str, int | float, Range]]:
    """Every number of a Config that is out of its range: its key, the number, the range."""
    values = [(key, value_at(config, key), allowed) for key, allowed in RANGES.items()]
    values += [
        (f"teachers.{name}.{key}", value_at(teacher, key), allowed)
        for name, teacher in config.teachers.items()
        for key, allowed in TEACHER.items()
    ]
    for key, value, allowed in values:
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and number not in allowed:
                yield key, number, allowed


def value_at(config: Any, key: str) -> Any:
    """The value under a dotted key; None where a section on the way is None."""
    value = config
    for part in key.split("."):
        if value is None:
            return None
        value = getattr(value, part)
    return value


def not_finite(thing: Any, at: str) -> Iterator[tuple[str, float]]:
    """Every float within dataclasses, mappings and sequences that is infinite or NaN, with its dotted key."""
    if isinstance(thing, float) and not math.isfinite(thing):
        yield at, thing
    inner: Iterable[tuple[Any, Any]] = ()
    if is_dataclass(thing):
        inner = ((f.name, getattr(thing, f.name)) for f in fields(thing))
    elif isinstance(thing, Mapping):
        inner = thing.items()
    elif isinstance(thing, list | tuple):
        inner = enumerate(thing)
    for key, value in inner:
        yield from not_finite(value, f"{at}.{key}")
