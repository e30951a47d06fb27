"""A few groups of a step, readable: the question, every answer with its reward's parts and its advantage."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.types import TRAINED, Group, Origin, Sample
from rlkd.report.files import as_json, replace_file

Decode = Callable[[np.ndarray], str]  # token ids to text


def write_samples(path: Path, step: int, groups: Sequence[Group], decode: Decode) -> None:
    """One line a group; the file appears whole. OSError if it cannot be written."""
    replace_file(path, "".join(as_json(group_record(step, g, decode), sort_keys=False) + "\n" for g in groups))


def group_record(step: int, group: Group, decode: Decode) -> dict[str, Any]:
    """A group for people: text first."""
    prompt = group.prompt
    return {
        "step": step,
        "id": prompt.id,
        "question": question(group, decode),
        "answer": prompt.answer,
        "source": prompt.source,
        "seed": prompt.seed,
        "samples": [sample_record(sample, decode) for sample in group.samples],
    }


def sample_record(sample: Sample, decode: Decode) -> dict[str, Any]:
    """`advantage`: mean over the trained tokens, None before credit; `advantages` only where they differ by token."""
    written = sample.origin != Origin.PROMPT
    record: dict[str, Any] = {
        "text": answer(sample, decode),
        "reward": sample.reward,
        "scores": dict(sample.scores),
        "advantage": mean_advantage(sample),
        "finish": sample.finish.value,
        "versions": list(sample.versions),
        "guided": sample.guided,
        "tokens": sample.tokens[written],
    }
    if sample.advantage is not None and len(np.unique(sample.advantage[written])) > 1:
        record["advantages"] = sample.advantage[written]
    return record


def shown(groups: Sequence[Group], n: int) -> Sequence[Group]:
    """At most n groups, spread evenly from the worst mean reward to the best, so that a look at them shows both."""
    if len(groups) <= n or n == 0:
        return groups[:n]
    order = sorted(groups, key=lambda g: float(np.nan_to_num(g.rewards).mean()) if g.samples else 0.0)
    places = np.linspace(0, len(order) - 1, n).round().astype(int) if n > 1 else [len(order) // 2]
    return [order[i] for i in places]


def question(group: Group, decode: Decode) -> str:
    return group.prompt.text or decode(group.prompt.tokens)


def answer(sample: Sample, decode: Decode) -> str:
    return decode(sample.tokens[sample.origin != Origin.PROMPT])


def mean_advantage(sample: Sample) -> float | None:
    trained = (sample.origin & int(TRAINED)) != 0
    if sample.advantage is None or not trained.any():
        return None
    return float(sample.advantage[trained].mean())


def one_line(group: Group, sample: Sample, decode: Decode, success: float) -> Mapping[str, Any]:
    """What the terminal's sample line is made of."""
    return {
        "question": question(group, decode),
        "answer": answer(sample, decode),
        "reward": sample.reward,
        "right": sample.reward > success,
        "advantage": mean_advantage(sample),
    }
