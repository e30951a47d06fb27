"""`rlkd check`: everything a run needs, looked at before anything is started; real rows scored, nothing trained."""

import math
from collections.abc import Mapping
from typing import Any

from rlkd import inputs
from rlkd.config.schema import Config
from rlkd.core.errors import DataError, Problem
from rlkd.core.ports import Answer
from rlkd.core.types import Finish, Prompt
from rlkd.engines.probe import Probe, gold_and_wrong, probe
from rlkd.inputs import Inputs
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import pack


def checked(config: Config) -> dict[str, Any]:
    """What would run, in words and as data. Raises the RlkdError of whatever is wrong."""
    read = inputs.read(config)
    probes = judged(config, read)
    text = "\n".join([*_words(config, read), *_scores(config, probes), "ok: nothing was started, nothing was trained"])
    return {
        "prompts": len(read.data.train.prompts),
        "holdout": len(read.data.holdout.prompts) if read.data.holdout else 0,
        "sequences_per_step": config.schedule.groups_per_step * config.algorithm.rollout.samples,
        "context": read.context,
        "longest_prompt": read.longest_prompt,
        "warnings": list(read.data.warnings),
        "text": text,
    }


def judged(config: Config, read: Inputs) -> list[Probe]:
    """Three real rows judged in the jail, each on its own answer and on a wrong one. DataError if a reward fails."""
    prompts = read.data.train.prompts[:3]
    limits = {"timeout_s": config.verifier.timeout_s, "memory_gib": config.verifier.memory_gib}
    answers = [_answers(p) for p in prompts]
    probes = probe(pack(config.rewards), prompts, answers, limits)
    problems = [
        Problem(
            "RLKD-D310",
            f"reward {failure.reward or '?'}: {failure.outcome.value}: {failure.headline}",
            where=f"prompt {p.prompt.id}, answer {answer.text[:200]!r}",
            fix=f"correct the reward; the end of what it printed: {failure.output[-300:]!r}" if failure.output else
            "correct the reward, or see verifier.timeout_s and verifier.memory_gib",
        )
        for p in probes
        for answer, verdict in zip(p.answers, p.verdicts, strict=True)
        if (failure := verdict.failure) is not None
    ]  # fmt: skip
    if problems:
        raise DataError.of(problems)
    return probes


def _answers(prompt: Prompt) -> tuple[Answer, ...]:
    """The gold answer in the forms that verifiers know, and a wrong one."""
    forms = (f"#{prompt.answer}", f"The answer is \\boxed{{{prompt.answer}}}.", f"<answer>{prompt.answer}</answer>")
    return (*gold_and_wrong(prompt), *(Answer(t, Finish.STOP, len(t.split())) for t in forms))


def _words(config: Config, read: Inputs) -> list[str]:
    s, samples = config.schedule, config.algorithm.rollout.samples
    sequences = s.groups_per_step * samples
    under_way = (s.staleness + 1) * s.groups_per_step
    steps = f"{s.steps:,} steps × {s.groups_per_step} prompts = {s.steps * s.groups_per_step:,} prompts"
    epochs = s.steps * s.groups_per_step / len(read.data.train.prompts)
    longest = read.longest_prompt + config.sampler.max_tokens
    lines = [
        f"model      {config.model.path}: {read.context:,} tokens of context, {read.tokenizer.vocabulary:,} token ids",
        f"algorithm  {config.algorithm.name}",
        f"batch      {s.groups_per_step} prompts × {samples} samples = {sequences:,} sequences a step, "
        f"at most {under_way} groups under way, at most {s.staleness} steps old",
        f"           {steps}, {epochs:.2g} epochs; a sample has at most {longest:,} tokens, "
        f"a micro-batch {config.learner.max_tokens:,} (which changes no gradient)",
        f"workers    {config.sampler.workers} × {config.sampler.engine}, {config.learner.ranks} learner ranks, "
        f"{config.verifier.workers} reward workers",
    ]
    for name, dataset in (("train", read.data.train), ("holdout", read.data.holdout)):
        if dataset is not None:
            lines += [f"{name if i == 0 else '':<10} {line}" for i, line in enumerate(str(dataset.funnel).split("\n"))]
    return lines + [f"warning    {w}" for w in read.data.warnings]


def _scores(config: Config, probes: list[Probe]) -> list[str]:
    mix = Mix.of(config.rewards)
    lines = []
    for p in probes:
        question = p.prompt.text.strip().replace("\n", " ")[:60]
        lines.append(f"row        {p.prompt.id}: “{question}”, gold “{p.prompt.answer[:30]}” ({p.seconds:.2f} s)")
        for answer, verdict in zip(p.answers, p.verdicts, strict=True):
            parts, reward = mix(verdict.scores)
            lines.append(f"           {answer.text[:44]!r:<46} reward {_number(reward)}  {_parts(parts)}")
    return lines


def _number(value: float) -> str:
    return "unjudged" if math.isnan(value) else f"{value:.2f}"


def _parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in parts.items())
