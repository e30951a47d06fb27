"""`rlkd check`: everything a run needs, looked at before anything is started; real rows scored, nothing trained.

Teachers that the algorithm asks are started as a run would start them, asked one thing each, and ended again.
"""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlkd import inputs
from rlkd.config.schema import Config
from rlkd.core.errors import DataError, InfrastructureError, Problem, WorkerLost
from rlkd.core.ports import Answer, Model, Writer
from rlkd.core.types import Finish, Prompt
from rlkd.engines.probe import Probe, gold_and_wrong, probe
from rlkd.engines.sandbox import probe as probe_sandbox
from rlkd.inputs import Inputs
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import pack
from rlkd.teachers import scorers, unused, writers

DIFFERENT = 1e-3  # nats between two answers to the same question, above which a scorer is not to be relied on


def checked(config: Config) -> dict[str, Any]:
    """What would run, in words and as data. Raises the RlkdError of whatever is wrong."""
    read = inputs.read(config)
    probes = judged(config, read)
    teachers = asked(config, read)
    started = "the teachers were started and ended again" if teachers else "nothing was started"
    text = "\n".join(
        [*_words(config, read), *_scores(config, probes), *teachers, f"ok: {started}, nothing was trained"]
    )
    return {
        "prompts": len(read.data.train.prompts),
        "holdout": len(read.data.holdout.prompts) if read.data.holdout else 0,
        "sequences_per_step": config.schedule.groups_per_step * config.algorithm.rollout.samples,
        "context": read.context,
        "longest_prompt": read.longest_prompt,
        "warnings": [*read.data.warnings, *unused(config)],
        "text": text,
    }


def judged(config: Config, read: Inputs) -> list[Probe]:
    """Three real rows judged in the jail, each on its own answer and on a wrong one. DataError if a reward fails."""
    prompts = read.data.train.prompts[:3]
    names = ("timeout_s", "memory_gib", "min_tier", "accept_unsafe_code")
    limits = {name: getattr(config.verifier, name) for name in names}
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


def asked(config: Config, read: Inputs) -> list[str]:
    """What the teachers that the algorithm asks say: log-probs of a real row's answer, a text to its question."""
    if not scorers(config) and not writers(config):
        return []
    try:
        return asyncio.run(_asked(config, read))
    except WorkerLost as lost:
        raise InfrastructureError(
            "RLKD-I007", f"a teacher was lost: {lost}", "teachers", "Ray's logs say why its process ended"
        ) from lost


async def _asked(config: Config, read: Inputs) -> list[str]:
    from rlkd.fleet import Fleet  # needs Ray, which most checks do not

    said: list[str] = []

    def tell(kind: str, text: str, **_: Any) -> None:
        if kind != "starting":
            said.append(f"teacher    {text}")

    prompt = read.data.train.prompts[0]
    async with Fleet.staff(config, read, tell) as staff:
        models = staff.teachers()
        if (reference := staff.reference()) is not None:
            models = {"reference": reference, **models}
        lines = [await _scored(name, model, prompt, read) for name, model in models.items()]
        lines += [await _written(name, writer, prompt) for name, writer in staff.writers().items()]
    return said + lines


async def _scored(name: str, model: Model, prompt: Prompt, read: Inputs) -> str:
    """Asked twice: a scorer whose answers differ is no teacher."""
    answer = np.append(read.tokenizer.encode_many([prompt.answer], special=False)[0], read.tokenizer.eos)
    tokens = np.concatenate([prompt.tokens, answer]).astype(np.int32)
    (first,), (second,) = await model.logp([tokens]), await model.logp([tokens])
    logp, apart = first[-len(answer) :], float(np.nanmax(np.abs(first - second), initial=0.0))
    known = logp[~np.isnan(logp)]
    mean = f"{known.mean():.2f} a token" if len(known) else "unknown"
    text = f"teacher    {name}: log-prob of the answer “{prompt.answer[:30]}” to {prompt.id}: {mean}"
    text += f", {len(logp) - len(known)} of {len(logp)} unknown" if len(known) < len(logp) else ""
    return text + (f"; WARNING: asked again it says something else, by {apart:.2g}" if apart > DIFFERENT else "")


async def _written(name: str, writer: Writer, prompt: Prompt) -> str:
    written = await writer.write(prompt.conversation, prompt.seed)
    size = "an unknown number of" if written.tokens is None else f"{written.tokens}"
    return f"teacher    {name} writes to {prompt.id}: {written.text[:80]!r} ({size} tokens, {written.finish})"


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
    if any(getattr(reward, "runs_code", False) for reward in config.rewards.values()):
        found = probe_sandbox()
        reason = f": {found.reason}" if found.reason else ""
        lines.append(f"sandbox    the models' code runs in tier {found.tier} here{reason}")
    for name, dataset in (("train", read.data.train), ("holdout", read.data.holdout)):
        if dataset is not None:
            lines += [f"{name if i == 0 else '':<10} {line}" for i, line in enumerate(str(dataset.funnel).split("\n"))]
    return lines + [f"warning    {w}" for w in (*read.data.warnings, *unused(config))]


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
