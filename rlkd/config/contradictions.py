"""What in a Config is impossible or contradicts itself. Pure, and all at once; each finding says what would fit.

What needs the machine (a GPU, packages, the model's folder) is for preflight, what needs the prompts for `check` with
`longest_prompt`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from rlkd.config.cluster_rules import cluster
from rlkd.config.demonstration_rules import demonstrations
from rlkd.config.finding import Finding, Given
from rlkd.config.ranges import not_finite, outside, value_at
from rlkd.config.schema import Config, CurriculumConfig
from rlkd.config.teacher_rules import teachers
from rlkd.core.stop import seconds_until
from rlkd.core.types import Signal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # it becomes a folder; F30 of reliability_ux.md


def findings(config: Config, model_context: int | None = None, longest_prompt: int | None = None) -> list[Finding]:
    """Every problem of the config. `model_context` (tokens) is the model's own, `longest_prompt` that of the data."""
    given = Given(config, config.model.context or model_context, longest_prompt or config.data.max_prompt_tokens)
    found = []
    for key, number, allowed in outside(config):
        fix = f"{key}: {allowed}" if allowed.example is None else f"for example {key}={allowed.example}"
        found.append(Finding((key,), f"{key}={number}: must be {allowed}", fix, "RLKD-C012"))
    for section in ("algorithm", "rewards"):
        for key, number in not_finite(getattr(config, section), section):
            found.append(Finding((key,), f"{key}={number}", "a finite number", "RLKD-C012"))
    if model_context is not None and config.model.context is not None and config.model.context > model_context:
        what = (
            f"model.context={config.model.context} is more than the {model_context} tokens that the model was made for"
        )
        found.append(Finding(("model.context",), what, f"at most {model_context}, or leave it out"))
    wrong_already = {key for finding in found for key in finding.keys}
    for part in PARTS:
        found += [f for f in part(given) if not wrong_already & set(f.keys)]
    return found


def _algorithm(given: Given) -> Iterator[Finding]:
    """The algorithm's own `problems()`, and what it asks of the other sections."""
    config, algorithm = given.config, given.config.algorithm
    for problem in algorithm.problems() if hasattr(algorithm, "problems") else ():
        named = re.match(r"[A-Za-z_][\w.]*", problem)
        key = f"algorithm.{named.group()}" if named and _has(algorithm, named.group()) else "algorithm"
        prefix = "algorithm." if key != "algorithm" else f"algorithm {algorithm.name}: "
        yield Finding((key,), prefix + problem, "see the algorithm's file for what each setting means")
    limit = getattr(algorithm, "overlong_max", None)
    if limit is not None and limit != config.sampler.max_tokens:
        what = f"algorithm.overlong_max={limit} is not sampler.max_tokens={config.sampler.max_tokens}"
        fix = "write `overlong_max: ${sampler.max_tokens}`: it is the length at which an answer is cut"
        yield Finding(("algorithm.overlong_max", "sampler.max_tokens"), what, fix)
    if getattr(algorithm, "correction", None) == "mis" and algorithm.correction_low >= algorithm.correction_cap:
        low, cap = algorithm.correction_low, algorithm.correction_cap
        what = f"algorithm.correction_low={low} must be below correction_cap={cap}, or every token is masked"
        yield Finding(("algorithm.correction_low", "algorithm.correction_cap"), what, "for example 0.5 and 2.0")


def _has(thing: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def _rewards(given: Given) -> Iterator[Finding]:
    rewards = given.config.rewards
    if not rewards:
        yield Finding(("rewards",), "there are no rewards", "for example `rewards: {exact: {}}`")
        return
    if all(r.weight == 0 for r in rewards.values()):
        keys = tuple(f"rewards.{name}.weight" for name in rewards)
        yield Finding(keys, "every reward has weight 0: there is nothing to learn", "give at least one a weight")
    for name, reward in rewards.items():
        key = f"rewards.{name}"
        for problem in reward.problems() if hasattr(reward, "problems") else ():
            yield Finding((key,), f"{key}: {problem}", "see the reward's file for what each option means")
        if not hasattr(reward, "longest_s"):
            continue
        most = max(_samples(given.config), given.config.evaluate.samples)  # answers of a group
        longest, limit = reward.longest_s(most), given.config.verifier.timeout_s
        if longest > limit:
            what = f"{key} may take {longest:g} s for a group, and verifier.timeout_s={limit:g} ends it as a failure"
            fix = f"verifier.timeout_s={math.ceil(longest)}, or a smaller {key}.answer_s"
            yield Finding(("verifier.timeout_s", key), what, fix)
    cut, answer = getattr(rewards.get("overlong"), "max_tokens", None), given.config.sampler.max_tokens
    if cut is not None and cut > answer:
        what = f"rewards.overlong.max_tokens={cut} is never reached: answers end at sampler.max_tokens={answer}"
        keys = ("rewards.overlong.max_tokens", "sampler.max_tokens")
        yield Finding(keys, what, "write `max_tokens: ${sampler.max_tokens}`")


def _batch(given: Given) -> Iterator[Finding]:
    """Three numbers make a batch: prompts a step × samples a prompt, and the tokens of a micro-batch."""
    config = given.config
    groups, ranks, size = config.schedule.groups_per_step, config.learner.ranks, config.data.train.size
    samples = _samples(config)
    groups_key, ranks_key = "schedule.groups_per_step", "learner.ranks"
    if size is not None and groups > size:
        what = f"{groups_key}={groups}, but data.train.size={size}: a prompt would stand twice in one step"
        yield Finding((groups_key, "data.train.size"), what, f"{groups_key}={size}, or data.train.size={groups}")
    units, unit = (groups, "groups") if config.algorithm.whole_groups else (groups * samples, "samples")
    if units < ranks:
        what = f"{ranks_key}={ranks} is more than the {units} {unit} of a step: some ranks would have nothing to do"
        fix = f"{ranks_key}={units}, or more {groups_key}"
        yield Finding((ranks_key, groups_key, "algorithm.rollout.samples"), what, fix)
    warmup, steps = config.learner.warmup_steps, config.schedule.steps
    if warmup >= steps:
        what = f"learner.warmup_steps={warmup} never ends within schedule.steps={steps}"
        yield Finding(("learner.warmup_steps", "schedule.steps"), what, f"at most {steps - 1}")


def _samples(config: Config) -> int:
    return int(getattr(config.algorithm.rollout, "samples", 1))


def _lengths(given: Given) -> Iterator[Finding]:
    """Prompt + answer must fit into the context, and into a micro-batch of the learner and of the scorers."""
    config, context, prompt = given.config, given.context, given.longest_prompt
    answer, answer_key, limit_key = config.sampler.max_tokens, "sampler.max_tokens", "data.max_prompt_tokens"
    limit = config.data.max_prompt_tokens
    if context is not None and answer + 1 > context:
        what = f"{answer_key}={answer} leaves no room for a prompt in a context of {context} tokens"
        yield Finding((answer_key, "model.context"), what, f"{answer_key}={context // 2}, or less")
    elif context is not None and limit is not None and limit + answer > context:
        what = f"{limit_key}={limit} and {answer_key}={answer} make {limit + answer} tokens; the context has {context}"
        fix = f"{limit_key}={context - answer}" + (f", or {answer_key}={context - limit}" if limit < context else "")
        yield Finding((limit_key, answer_key, "model.context"), what, fix)
    if config.sampler.min_tokens > answer:
        what = f"sampler.min_tokens={config.sampler.min_tokens} is more than {answer_key}={answer}"
        yield Finding(("sampler.min_tokens", answer_key), what, f"at most {answer}")
    whole, known = config.algorithm.whole_groups, 1 if prompt is None else prompt
    samples = _samples(config) if whole else 1
    longest, unit = known + samples * answer, f"group of {samples} samples" if whole else "sample"
    at_least = "at least " if prompt is None else "up to "
    keys = [("learner.max_tokens", config.learner.max_tokens, longest)]
    if Signal.REFERENCE in config.algorithm.needs:
        keys.append(("reference.max_tokens", config.reference.max_tokens, known + answer))
    local = {name: teacher for name, teacher in config.teachers.items() if teacher.endpoint is None}
    keys += [(f"teachers.{n}.max_tokens", t.max_tokens, known + answer) for n, t in local.items()]
    for key, has, needed in keys:
        if has < needed:
            of = unit if key.startswith("learner") else "sample"
            what = f"{key}={has}, but a {of} has {at_least}{needed} tokens: prompt {known} + answer {answer}"
            what += f" × {samples}" if of != "sample" else ""
            fix = f"{key}={needed}, or shorten {answer_key}" + (f" or {limit_key}" if prompt else "")
            yield Finding((key, answer_key, limit_key), what, fix)


def _sampler(given: Given) -> Iterator[Finding]:
    sampler, model = given.config.sampler, given.config.model
    if sampler.top_p < 1:
        what = (
            f"sampler.top_p={sampler.top_p}: training needs samples of the whole distribution, "
            "for the learner computes log-probabilities of that one"
        )
        yield Finding(("sampler.top_p",), what, "sampler.top_p=1; evaluate.top_p may be lower")
    if sampler.engine == "hf" and sampler.tensor_parallel > 1:
        what = f"sampler.tensor_parallel={sampler.tensor_parallel} is of the engine vllm, not of hf"
        yield Finding(("sampler.tensor_parallel", "sampler.engine"), what, "sampler.engine=vllm, or leave it out")
    if model.device == "cpu" and model.attention == "flash":
        what = "model.attention=flash needs a GPU, and model.device=cpu"
        yield Finding(("model.attention", "model.device"), what, "model.attention=sdpa, or leave it out")
    if model.device == "cpu" and given.config.learner.offload:
        what = "learner.offload moves the optimizer from GPU to host memory, and model.device=cpu"
        yield Finding(("learner.offload", "model.device"), what, "learner.offload=false")
    if not model.path and given.config.model.path is not None:
        yield Finding(("model.path",), "model.path is empty", "the folder of a Hugging Face model")


def _learner(given: Given) -> Iterator[Finding]:
    learner = given.config.learner
    if learner.ranks == 1 and learner.zero_stage and not learner.offload:
        what = f"learner.zero_stage={learner.zero_stage} shards over ranks, and learner.ranks=1"
        yield Finding(("learner.zero_stage", "learner.ranks"), what, "leave it out, or learner.ranks=2")
    stage = learner.zero_stage if learner.zero_stage is not None else int(learner.ranks > 1)
    if learner.offload and stage == 0:
        what = "learner.offload needs learner.zero_stage 1, 2 or 3; it is 0"
        what += "" if learner.zero_stage == 0 else " on one rank by default"
        yield Finding(("learner.offload", "learner.zero_stage"), what, "learner.zero_stage=2")


def _data(given: Given) -> Iterator[Finding]:
    data, model = given.config.data, given.config.model
    for name, source in (("train", data.train), ("holdout", data.holdout)):
        if source is None:
            continue
        at = f"data.{name}"
        if not source.path and source.kind != "arithmetic":
            wanted = "the task's name" if source.kind == "reasoning_gym" else "the file or folder with the prompts"
            yield Finding(
                (f"{at}.path", f"{at}.kind", at), f"{at}.path is missing for kind {source.kind}", f"give {wanted}"
            )
        if source.size is None and source.kind in ("arithmetic", "reasoning_gym"):
            what = f"{at}.size is missing: the generator {source.kind} needs to know how many prompts to make"
            yield Finding((f"{at}.size", f"{at}.kind", at), what, f"for example {at}.size=1000")
        if source.kind == "arithmetic" and source.split not in ("train", "holdout"):
            what = f"{at}.split={source.split}: the arithmetic task has the splits train and holdout"
            yield Finding((f"{at}.split", at), what, f"{at}.split={name}")
        if source.prompt == source.answer:
            what = f"{at}.prompt and {at}.answer are the same column, `{source.prompt}`"
            yield Finding((f"{at}.answer", f"{at}.prompt"), what, "the column that the verifier checks against")
    if data.holdout is not None and _origin(data.holdout) == _origin(data.train):
        what = "data.holdout is data.train: evaluation would be on the prompts that are trained on"
        keys = tuple(f"data.holdout.{name}" for name in ("path", "split", "seed"))
        yield Finding((*keys, "data.holdout", "data.train"), what, "give another path, split or seed (of a generator)")
    for key in ("chat_template", "system"):
        if not data.chat and getattr(model, key) is not None:
            what = f"model.{key} is not used when data.chat=false"
            yield Finding((f"model.{key}", "data.chat"), what, f"data.chat=true, or leave model.{key} out")


def _origin(source: Any) -> tuple[Any, ...]:
    generated = (source.seed, source.options) if source.kind == "reasoning_gym" else ()
    split = (source.split,) if source.kind in ("huggingface", "arithmetic") else ()
    return (source.kind, source.path, *split, *generated)


def _evaluate(given: Given) -> Iterator[Finding]:
    evaluate, key = given.config.evaluate, "evaluate.samples"
    asked = [n for n in ("at_start", "at_end", "every") if getattr(evaluate, n)]
    if asked and given.config.data.holdout is None:
        off = " ".join(f"evaluate.{n}={0 if n == 'every' else 'false'}" for n in asked)
        what = f"evaluate.{asked[0]} asks for an evaluation, and there is no data.holdout"
        keys = (*(f"evaluate.{n}" for n in asked), "data.holdout", "data")
        yield Finding(keys, what, f"give data.holdout, or {off}")
    if evaluate.samples > 1 and evaluate.temperature == 0:
        what = f"{key}={evaluate.samples} at evaluate.temperature=0 would be the same answer each time"
        yield Finding((key, "evaluate.temperature"), what, f"evaluate.temperature=1, or {key}=1")
    if not evaluate.k:
        yield Finding(("evaluate.k",), "evaluate.k is empty: nothing would be measured", "evaluate.k=[1]")
    elif max(evaluate.k) > evaluate.samples:
        what = f"pass@{max(evaluate.k)} cannot be estimated from {key}={evaluate.samples}"
        fix = f"{key}={max(evaluate.k)} or more, or evaluate.k up to {evaluate.samples}"
        yield Finding(("evaluate.k", key), what, fix)


def _checkpoint(given: Given) -> Iterator[Finding]:
    c, evaluate = given.config.checkpoint, given.config.evaluate
    if c.keep_every and c.every and c.keep_every % c.every:
        what = f"checkpoint.keep_every={c.keep_every} is no multiple of checkpoint.every={c.every}: few steps are both"
        fix = f"checkpoint.keep_every={-(-c.keep_every // c.every) * c.every}"
        yield Finding(("checkpoint.keep_every", "checkpoint.every"), what, fix)
    if c.keep_best and not evaluate.every:
        what = f"checkpoint.keep_best={c.keep_best} needs held-out results to compare, and evaluate.every=0"
        yield Finding(
            ("checkpoint.keep_best", "evaluate.every"), what, "give evaluate.every, or checkpoint.keep_best=0"
        )
    if c.keep_every and not c.every:
        when = "only the last step is saved" if c.every == 0 else "it is saved by time, at no particular steps"
        what = f"checkpoint.keep_every={c.keep_every} needs checkpoint.every: {when}"
        yield Finding(("checkpoint.keep_every", "checkpoint.every"), what, f"checkpoint.every={c.keep_every}")
    if c.keep_best and c.every == 0:
        what = f"checkpoint.keep_best={c.keep_best}, and checkpoint.every=0 saves only the last step"
        yield Finding(("checkpoint.keep_best", "checkpoint.every"), what, "give checkpoint.every")
    if c.remote is not None and re.search(r"://[^/]*@|[*?\[\]]|^$|:/*$", c.remote):
        what = "checkpoint.remote is no plain URL of a folder: it is empty, or has a password or one of `*?[]` in it"
        fix = "for example s3://bucket/folder; keys come from the environment, see the store's own documentation"
        yield Finding(("checkpoint.remote",), what, fix)


def _health(given: Given) -> Iterator[Finding]:
    warn, stop = given.config.health.mismatch_warn, given.config.health.mismatch_stop
    if warn and stop and warn > stop:
        what = f"health.mismatch_warn={warn} is above health.mismatch_stop={stop}: the run would end without a warning"
        yield Finding(("health.mismatch_warn", "health.mismatch_stop"), what, f"health.mismatch_warn={stop / 10:g}")


def _names(given: Given) -> Iterator[Finding]:
    config = given.config
    if not NAME.fullmatch(config.name):
        what = f"name={config.name[:120]!r} cannot be the name of a run"
        yield Finding(("name",), what, "letters, digits, `.`, `_` and `-`, a letter or digit first, 100 at most")
    for teacher in config.teachers:
        if not NAME.fullmatch(teacher) or teacher == "reference":
            what = f"{teacher[:120]!r} cannot be the name of a teacher"
            fix = "letters, digits, `.`, `_` and `-`; `reference` is the policy's frozen start"
            yield Finding((f"teachers.{teacher}",), what, fix)
    if (ends := config.preempt.must_end_by) is not None:
        try:
            seconds_until(ends, 0.0)
        except ValueError:
            what = f"preempt.must_end_by={ends!r} is no time"
            fix = "seconds after the start (3600), or an ISO time (2026-11-21T18:00+01:00)"
            yield Finding(("preempt.must_end_by",), what, fix)
    for key in ("report.directory", *(("report.wandb_project",) if config.report.wandb != "off" else ())):
        if not value_at(config, key):
            yield Finding((key,), f"{key} is empty", "give a name")


def _curriculum(given: Given) -> Iterator[Finding]:
    c, default = given.config.curriculum, CurriculumConfig()
    if c.low > c.high:
        what = f"curriculum.low={c.low} is above curriculum.high={c.high}: every prompt would be outside"
        yield Finding(("curriculum.low", "curriculum.high"), what, "for example curriculum.low=0.05")
    if c.name == "uniform" and c != default:
        changed = [f.name for f in fields(c) if getattr(c, f.name) != getattr(default, f.name)]
        what = f"curriculum.{changed[0]} is of the curriculum difficulty, and curriculum.name=uniform"
        yield Finding((f"curriculum.{changed[0]}",), what, "curriculum.name=difficulty, or leave it out")


PARTS: tuple[Callable[[Given], Iterator[Finding]], ...] = (
    _names,
    _algorithm,
    teachers,
    demonstrations,
    cluster,
    _rewards,
    _batch,
    _curriculum,
    _lengths,
    _sampler,
    _learner,
    _data,
    _evaluate,
    _checkpoint,
    _health,
)
