"""The composition root: from a recipe to a running job, an evaluation, an exported model. Knows everybody."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlkd import attempt as attempts
from rlkd import export as exported
from rlkd import fingerprint, inputs
from rlkd.attempt import Attempt
from rlkd.config.load import resolved
from rlkd.config.schema import Config
from rlkd.core.errors import RESUBMIT, PreflightError, Stopped
from rlkd.core.ports import Sampling
from rlkd.core.types import Prompt
from rlkd.curriculum import Band, Difficulty, Uniform
from rlkd.ending import announced, saving, started, translated
from rlkd.fleet import Fleet
from rlkd.inputs import Inputs
from rlkd.job import checkpoints, closing, guards, refuse_remote, saved_before
from rlkd.preempt import Watcher, watching
from rlkd.report import secrets
from rlkd.report.files import plain
from rlkd.report.progress import Progress
from rlkd.report.report import Report
from rlkd.report.sinks import Isolated, TensorBoard, Wandb
from rlkd.signals import Signals, grace_of_platform
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop
from rlkd.train.passk import Evaluation
from rlkd.watch import Watch
from rlkd.workers import drain


def train(
    config: Config,
    recipe: Path,
    resume: str = "auto",
    accept_new_data: bool = False,
    more_follows: bool = False,
    watch: Watch | None = None,
) -> int:
    """Train to the last step, from the newest checkpoint if there is one; the exit code. The summary goes to stdout.

    `resume`: auto, never (a new run), or the step of the checkpoint to go back to. With `accept_new_data` other prompts
    than the run began with are no error: a new epoch of them begins. `more_follows`: another stage would be next, so
    that a request to stop which came with the last step is still one.
    """
    secrets.learn(os.environ, str(recipe))
    secrets.KNOWN.learn(config)
    watch = watch or Watch()
    directory, stop = attempts.run_directory(config), watch.stop
    progress = Progress(config.schedule.steps)
    with Signals(stop, grace_of_platform(config.preempt.grace_s)) as signals, ExitStack() as stack:
        stack.enter_context(translated(directory, stop))
        stack.callback(progress.close)
        with signals.interruptible():
            attempt = stack.enter_context(attempts.opened(directory, config, recipe, stop, progress.say))
            signals.last = attempt.interrupted
            stack.enter_context(translated(directory, stop))  # within the attempt: it writes down how it ends
            read, start = _prepared(attempt, config, recipe, resume, accept_new_data, progress.say)
        report = _report(config, read, directory, attempt.number, progress)
        stack.callback(report.close)
        code = asyncio.run(_train(config, read, report, attempt, signals, start, watch))
        print(report.summary())
        if more_follows and stop.request is not None:
            raise Stopped(RESUBMIT, f"{stop.request.text}: this stage is done; the same command begins the next")
        return code


@dataclass(frozen=True)
class _Start:
    """Where a run goes on: at which checkpoint (None: the newest), as what, with which news."""

    step: int | None
    fingerprint: Mapping[str, Any]
    told: Sequence[str]
    accept: Callable[[Mapping[str, Any]], bool]  # see Checkpoints.accept


def _prepared(
    attempt: Attempt, config: Config, recipe: Path, resume: str, accept_new_data: bool, say: Callable[[str], None]
) -> tuple[Inputs, _Start]:
    """Everything that is read before something is started; and whether this run may go on in this folder."""
    directory, number = attempt.directory, attempt.number
    step = attempts.starting_point(directory, resume, number)
    if resume == "never":
        refuse_remote(config)
    say(f"run {config.name} → {directory}   (Ctrl-C saves and stops; the same command continues)")
    read = inputs.read(config)
    for warning in read.data.warnings:
        say(f"[data] {warning}")
    record = attempts.read_record(directory)
    now, was = fingerprint.of(config, read), record.get("fingerprint", {})
    found = fingerprint.compare(was, now)
    if exported.checkpoints(directory):
        fingerprint.refuse(found, directory, accept_new_data)
    attempts.describe(directory, config, recipe, now)
    forks = record.get("lineage", []) if number == 1 else []
    told = [*(f"begins as a copy of {one['from']} at step {one['step']}" for one in forks), *found.told]

    def accept(facts: Mapping[str, Any]) -> bool:
        found = fingerprint.compare(facts.get("fingerprint", {}), now)
        fingerprint.refuse(found, directory, accept_new_data)
        return found.new_data

    return read, _Start(step, now, told, accept)


def _report(config: Config, read: Inputs, directory: Path, attempt: int, progress: Progress) -> Report:
    r = config.report
    report = Report(
        directory, read.tokenizer.decode, config.schedule.steps, r.samples_per_step, config.evaluate.success, attempt,
        progress=progress,
    )  # fmt: skip
    report.sinks = _sinks(config, directory, lambda text: report.event("tracker", text))
    return report


async def _train(
    config: Config, read: Inputs, report: Report, attempt: Attempt, signals: Signals, start: _Start, watch: Watch
) -> int:
    for text in start.told:
        report.event("resume", text)
    stop, saves = attempt.stop, checkpoints(config, attempt.directory, report.event, attempt.number)
    saves.accept, saves.promised = start.accept, saved_before(attempt.directory)
    saves.aside = lambda step: attempts.set_aside(attempt.directory, step, attempt.number)
    saves.facts = {**saves.facts, "fingerprint": {k: v for k, v in start.fingerprint.items() if k != "settings"}}
    held: list[Loop] = []

    def evaluated(step: int, result: Evaluation) -> None:
        report.evaluation(step, result)
        watch.evaluated(config, step, result.metrics())

    watcher = Watcher(config.preempt, stop, drain.draining, report.event, save_s=lambda: needed(saves, held))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(closing(saves, config, stop))
        starting = Fleet.start(
            config, read, attempt.directory, report.event, attempt=attempt.folder, was_draining=watcher.was_draining
        )
        fleet = await started(stack.enter_async_context(starting), stop, signals)
        watcher.essential, watcher.on_nodes = partial(essential_nodes, fleet.learner), fleet.leave
        prompts = read.data.train.prompts
        loop = Loop(
            config.schedule,
            config.algorithm,
            curriculum(config, prompts, read.data.train.fingerprint),
            {p.id: p for p in prompts},
            fleet.services,
            fleet.learner,
            saves,
            evaluator(config, read, evaluated),
            report,
            max_tokens=config.learner.max_tokens,
            success=config.evaluate.success,
            stop=stop,
            guards=guards(config, fleet, attempt.directory, report.event),
            resume=start.step,
            max_restarts=config.learner.max_restarts,
            max_failed_saves=config.checkpoint.max_failed_saves,
            deterministic=config.deterministic,
        )
        held.append(loop)
        loop.guards.settles_in_s = watcher.settles_in_s
        attempt.step = lambda: getattr(loop, "step", None)
        if fleet.roster is not None:
            fleet.roster.late = loop.stages.late
        await stack.enter_async_context(announced(stop, lambda: saving(attempt.step(), saves.save_s), report.event))
        await stack.enter_async_context(watching(watcher))
        return await loop.run()


def needed(saves: Checkpoints, loops: Sequence[Loop]) -> float | None:
    """Seconds from asking for a save to its end: it may have to wait for an optimizer step. None before the first."""
    return None if saves.save_s is None else saves.save_s + max((loop.held_s for loop in loops), default=0.0)


def curriculum(config: Config, prompts: Sequence[Prompt], fingerprint: str) -> Uniform:
    """Which prompt comes next, as the recipe wants it."""
    c = config.curriculum
    if c.name == "uniform":
        return Uniform(prompts, fingerprint, config.seed)
    return Difficulty(
        prompts, fingerprint, config.seed, Band(c.low, c.high, config.evaluate.success, c.recent, c.again)
    )


def say(kind: str, text: str, **_: Any) -> None:
    print(f"[{kind}] {text}", file=sys.stderr)


def evaluator(config: Config, read: Inputs, tell: Callable[[int, Any], None] | None = None) -> Evaluator:
    """The held-out evaluation as the recipe wants it."""
    e = config.evaluate
    prompts = read.data.holdout.prompts[: e.prompts] if read.data.holdout else ()
    sampling = Sampling(config.sampler.max_tokens, e.temperature, e.top_p, read.tokenizer.stop_tokens)
    return Evaluator(
        prompts, sampling, e.samples, e.k, e.success, e.every, e.at_start, e.at_end, seed=config.seed, tell=tell
    )


def evaluate(config: Config, what: Path, step: int | None = None) -> dict[str, Any]:
    """Evaluate a run's model of `step` (None: the newest), or a model folder, on the recipe's held-out prompts."""
    folder = exported.newest(what, step) if (what / "run.json").exists() else what
    config = replace(config, model=replace(config.model, path=str(folder)))
    read = inputs.read(config, teachers=False)
    if read.data.holdout is None:
        raise PreflightError("RLKD-E130", "the recipe has no data.holdout to evaluate on", where="data.holdout")

    async def run() -> Any:
        async with Fleet.start(config, read, folder, say, learner=False) as fleet:
            return await evaluator(config, read).run(0, fleet.services)

    result = asyncio.run(run())
    lines = [f"{folder}: {result.answers} answers to {result.prompts} held-out prompts"]
    lines += [str(e) for e in result.estimates]
    return {"model": str(folder), **plain(result.metrics()), "text": "\n".join(lines)}


def export(run_directory: Path, step: int | None, directory: Path) -> dict[str, Any]:
    """Copy a checkpoint's model as a Hugging Face folder, load it again, and compare its log-probs with those the
    learner had when it saved. PreflightError if they differ."""
    if not (run_directory / "run.json").exists():
        raise PreflightError("RLKD-E131", "this is no run's folder: it has no run.json", where=str(run_directory))
    worst = exported.export(run_directory, step, directory)
    text = f"{directory}: loaded again; log-probs differ from the learner's by at most {worst:.1e}"
    return {"directory": str(directory), "difference": worst, "text": text}


def check(config: Config) -> dict[str, Any]:
    """Everything validated, the batch arithmetic in words, three real rows scored; nothing is trained."""
    from rlkd.checks import checked

    return checked(config)


def essential_nodes(learner: Any) -> frozenset[str]:
    """The nodes that this run cannot go on without: the driver's, and where its own learner's ranks are now."""
    return frozenset({drain.own_node(), *drain.nodes_of(learner.actors)})


def _sinks(config: Config, directory: Path, tell: Callable[[str], None]) -> list[Isolated]:
    sinks = []
    if config.report.tensorboard:
        sinks.append(Isolated("TensorBoard", TensorBoard(directory / "tensorboard"), tell))
    if config.report.wandb != "off":
        import yaml

        settings = yaml.safe_load(resolved(config))  # secrets are left out there
        wandb = Wandb(directory, config.report.wandb_project, config.name, config.report.wandb, settings)
        sinks.append(Isolated("wandb", wandb, tell))
    return sinks
