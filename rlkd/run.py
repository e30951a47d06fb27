"""The composition root: from a recipe to a running job, an evaluation, an exported model. Knows everybody."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlkd import export as exported
from rlkd import inputs
from rlkd.config.load import resolved
from rlkd.config.schema import Config
from rlkd.core.errors import (
    INTERRUPTED,
    InfrastructureError,
    LearnerLost,
    PreflightError,
    RlkdError,
    Stopped,
    WorkerLost,
)
from rlkd.core.ports import Sampling
from rlkd.core.types import Prompt
from rlkd.curriculum import Band, Difficulty, Uniform
from rlkd.fleet import Fleet
from rlkd.inputs import Inputs
from rlkd.report.files import plain, replace_file
from rlkd.report.progress import Progress
from rlkd.report.report import Report
from rlkd.report.sinks import Isolated, TensorBoard, Wandb
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop


def train(config: Config, recipe: Path) -> int:
    """Train to the last step, from the newest checkpoint if there is one; the exit code. The summary goes to stdout."""
    read = inputs.read(config)
    directory = Path(config.report.directory) / config.name
    attempt = open_run(directory, config, recipe)
    progress = Progress(config.schedule.steps)
    progress.say(f"run {config.name} → {directory}   (Ctrl-C saves and stops; the same command continues)")
    for warning in read.data.warnings:
        progress.say(f"[data] {warning}")
    report = Report(
        directory,
        read.tokenizer.decode,
        config.schedule.steps,
        config.report.samples_per_step,
        config.evaluate.success,
        attempt,
        progress=progress,
    )
    report.sinks = _sinks(config, directory, lambda text: report.event("tracker", text))
    code = 1
    try:
        code = asyncio.run(_train(config, read, directory, report))
        print(report.summary())
        return code
    except Stopped as stopped:
        code = stopped.exit_code
        raise
    except (LearnerLost, WorkerLost) as lost:
        code = InfrastructureError.exit_code
        raise InfrastructureError(
            "RLKD-I003",
            f"the run lost {lost}",
            where=str(directory),
            fix="the same command continues from the last checkpoint; Ray's logs say why the process ended",
        ) from lost
    except RlkdError as error:
        code = error.exit_code
        raise
    finally:
        report.close()
        _close_run(directory, attempt, code)


async def _train(config: Config, read: Inputs, directory: Path, report: Report) -> int:
    async with Fleet.start(config, read, directory, report.event) as fleet:
        prompts = read.data.train.prompts
        loop = Loop(
            config.schedule,
            config.algorithm,
            curriculum(config, prompts, read.data.train.fingerprint),
            {p.id: p for p in prompts},
            fleet.services,
            fleet.learner,
            Checkpoints(directory / "checkpoints", config.checkpoint.every, config.checkpoint.keep),
            evaluator(config, read, report.evaluation),
            report,
            max_tokens=config.learner.max_tokens,
            success=config.evaluate.success,
        )
        with stop_signals(loop.stop, report.say):
            return await loop.run()


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


def evaluate(config: Config, what: Path) -> dict[str, Any]:
    """Evaluate a run's newest model, or a model folder, on the recipe's held-out prompts."""
    folder = exported.newest(what) if (what / "run.json").exists() else what
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


def export(run_directory: Path, step: int | None, directory: Path) -> None:
    """Copy a checkpoint's model as a Hugging Face folder, load it again, and compare its log-probs with those the
    learner had when it saved. PreflightError if they differ."""
    if not (run_directory / "run.json").exists():
        raise PreflightError("RLKD-E131", "this is no run's folder: it has no run.json", where=str(run_directory))
    worst = exported.export(run_directory, step, directory)
    print(f"{directory}: loaded again; log-probs differ from the learner's by at most {worst:.1e}")


def check(config: Config) -> dict[str, Any]:
    """Everything validated, the batch arithmetic in words, three real rows scored; nothing is trained."""
    from rlkd.checks import checked

    return checked(config)


def open_run(directory: Path, config: Config, recipe: Path) -> int:
    """Make the run's folder, or go on in it; the number of this attempt. A folder that is something else is refused."""
    path = directory / "run.json"
    if directory.exists() and any(directory.iterdir()) and not path.exists():
        raise PreflightError(
            "RLKD-E132",
            "the run's folder has other things in it and no run.json",
            where=str(directory),
            fix="give another name=…, or report.directory=…",
        )
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"name": config.name, "attempts": []}
    attempt = len(record["attempts"]) + 1
    packages = {name: version(name) for name in ("rlkd", "torch", "transformers", "ray", "deepspeed", "numpy")}
    record["attempts"].append({"attempt": attempt, "started": time.time(), "pid": os.getpid(), "packages": packages})
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1))
    replace_file(directory / "config.yaml", resolved(config))
    replace_file(directory / "config.source.yaml", recipe.read_text(encoding="utf-8"))
    return attempt


def _close_run(directory: Path, attempt: int, code: int) -> None:
    path = directory / "run.json"
    record = json.loads(path.read_text())
    record["attempts"][attempt - 1] |= {"ended": time.time(), "exit": code}
    replace_file(path, json.dumps(record, indent=1))


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


class stop_signals:
    """SIGTERM or one Ctrl-C: save and stop. A second Ctrl-C: stop at once, the last checkpoint stands.

    Set after ray.init, which installs a SIGTERM handler of its own.
    """

    def __init__(self, stop: asyncio.Event, say: Callable[[str], None]) -> None:
        self.stop, self.say = stop, say
        self.loop = asyncio.get_running_loop()
        self.main = asyncio.current_task()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self._asked, number)

    def __exit__(self, *exc: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.remove_signal_handler(number)

    def _asked(self, number: int) -> None:
        if not self.stop.is_set():
            self.say("stopping: saving the last whole step; press Ctrl-C again to stop without saving")
            self.stop.set()
        elif number == signal.SIGINT and self.main is not None:
            self.say(f"stopped without saving: the last checkpoint stands (exit {INTERRUPTED})")
            os._exit(INTERRUPTED)
