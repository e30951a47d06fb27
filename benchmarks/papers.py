"""The papers' claims on a small scale: KDRL, AMPO, LUFFY, ThinkTuning, SFT and on-policy distillation beside GRPO.

    python benchmarks/papers.py                    everything; on two cores about an hour and a quarter
    python benchmarks/papers.py --pilot            no more than the runs that choose learning rates and β
    python benchmarks/papers.py --only-models      student, teachers and traces alone

It trains the models it needs, chooses learning rates and β by a pilot, runs every method × seed through `rlkd train`,
and writes benchmarks/results/papers.md and papers.json after every run. What is finished is never run again: stop it
(Ctrl-C) whenever you like, and the same command goes on. Work is kept in models/papers (git-ignored).
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import papers_models as models
import papers_table as tables
from papers_methods import (
    FIRST,
    MODELS,
    PILOT_SEED,
    SEEDS,
    STUDENT,
    THEN,
    TRACES,
    TRIED,
    Method,
    Rates,
    Trial,
    best,
    methods,
    trials,
)
from papers_runs import Failed, Runner, evaluate_model, finished, outcome, places

from rlkd.report.files import plain, replace_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Job = Callable[[], None]
PACKAGES = ("rlkd", "torch", "transformers", "vllm", "ray", "deepspeed")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    os.chdir(ROOT)  # recipes and work are named from here, so that a printed command works for everybody
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{options.work} is in use by another benchmarks/papers.py", file=sys.stderr)
            return 3
        models.make_models(options.work, options.at_once)
        models.make_traces(options.work)
        if options.only_models:
            return 0
        return Benchmark(options).run()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0 … N−1 of each method (%(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at once, with one thread each (%(default)s)")
    keys = list(methods(""))
    parser.add_argument("--methods", nargs="+", metavar="KEY", default=keys, help="only these: " + ", ".join(keys))
    parser.add_argument("--work", type=Path, default=Path("models/papers"), help="folder, from the repository's root")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of papers.md and papers.json")
    parser.add_argument("--pilot", action="store_true", help="choose learning rates and β, no more")
    parser.add_argument("--only-models", action="store_true", help="make models and traces, no more")
    options = parser.parse_args(arguments)
    if unknown := [key for key in options.methods if key not in keys]:
        parser.error(f"there is no method `{unknown[0]}`; they are: " + ", ".join(keys))
    if options.seeds < 1 or options.at_once < 1:
        parser.error("--seeds and --at-once must be at least 1")
    options.out = options.out.resolve()
    return options


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.runner = Runner(self.work)
        self.rates: Rates | None = None  # before the pilot has chosen them
        self.methods: dict[str, Method] = {}
        self.found: dict[str, dict[str, float]] = {}  # models before training
        self.tried: list[dict[str, Any]] = []  # the pilot's runs
        self.results: dict[str, dict[int, Any]] = {}
        self.failed: list[str] = []
        self.lock = threading.Lock()

    def run(self) -> int:
        """0 if everything there was to do is done, 1 if something failed or it was stopped."""
        signal.signal(signal.SIGTERM, _as_interrupt)
        models_first = [self.model_job(made.name) for made in MODELS]
        through = self.all_of([*models_first, *self.trial_jobs(FIRST, None)])
        chosen = self.choose(FIRST, Rates()) if through and not self.failed else None
        through = chosen is not None and self.all_of(self.trial_jobs(THEN, chosen))
        self.rates = self.choose(THEN, chosen) if chosen and through and not self.failed else None
        if self.rates is not None:
            self.methods = methods(str(self.work), self.rates)
            jobs = [] if self.options.pilot else self.missing()
            self.write()
            through = self.all_of(jobs)
        for text in self.failed:
            say(f"failed: {text}")
        return 0 if through and not self.failed else 1

    def all_of(self, jobs: Sequence[Job]) -> bool:
        """Run them, a few at once; False if it was stopped."""
        with ThreadPoolExecutor(self.options.at_once) as pool:
            waiting = {pool.submit(job) for job in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    say(f"{len(jobs) - len(waiting)} of {len(jobs)}")
            except BaseException as stopped:
                say("stopping: every run saves its last whole step; the same command goes on")
                for future in waiting:
                    future.cancel()
                self.runner.stop()
                if not isinstance(stopped, KeyboardInterrupt):
                    raise
                return False
        return True

    # --- jobs

    def model_job(self, name: str) -> Job:
        return lambda: self.guarded(f"evaluating {name}", lambda: self.put_model(name))

    def trial_jobs(self, which: Sequence[str], rates: Rates | None) -> list[Job]:
        def job(trial: Trial) -> Job:
            return lambda: self.guarded(trial.method.key, lambda: self.put_trial(trial))

        return [job(trial) for trial in trials(str(self.work), which, rates)]

    def missing(self) -> list[Job]:
        """Seed by seed, so that a stopped benchmark has whole rows of fewer seeds. What is finished is read at once."""

        def job(method: Method, seed: int) -> Job:
            return lambda: self.guarded(f"{method.key}, seed {seed}", lambda: self.put_run(method, seed))

        every = [(method, seed) for seed in range(self.options.seeds) for method in self.methods.values()]
        for method, seed in every:
            chain = places(method, seed, self.work)
            if all(finished(place) for place in chain):
                self.results.setdefault(method.key, {})[seed] = outcome(chain)
        return [job(m, s) for m, s in every if m.key in self.options.methods and s not in self.results.get(m.key, {})]

    def choose(self, which: Sequence[str], rates: Rates) -> Rates:
        for rate in which:
            tried = {row["value"]: row["pass@1"] for row in self.tried if row["rate"] == rate}
            rates = replace(rates, **{rate: best(tried)})
        say(f"pilot: {rates}")
        return rates

    def guarded(self, what: str, job: Callable[[], None]) -> None:
        """A run that fails is told of and left out; the others go on."""
        if self.runner.stopping.is_set():
            return
        try:
            job()
        except Failed as error:
            if not self.runner.stopping.is_set():
                with self.lock:
                    self.failed.append(f"{what}: {error}")
                    say(self.failed[-1])
                    self.write()

    def put_model(self, name: str) -> None:
        found = evaluate_model(self.runner, name)
        with self.lock:
            self.found[name] = found

    def put_trial(self, trial: Trial) -> None:
        found = self.runner.run(trial.method, PILOT_SEED)
        metrics = {name: found[name] for name in (*tables.RATES, "length", "all_wrong_end", "seconds", "right")}
        with self.lock:
            self.tried.append({"rate": trial.rate, "value": trial.value, **metrics})
            self.tried.sort(key=lambda row: (list(TRIED).index(row["rate"]), row["value"]))
            say(f"{trial.method.key}: pass@1 {found['pass@1']:.3f}, {found['seconds']:.0f} s")

    def put_run(self, method: Method, seed: int) -> None:
        found = self.runner.run(method, seed)
        with self.lock:
            self.results.setdefault(method.key, {})[seed] = found
            say(f"{method.key}, seed {seed}: pass@1 {found['pass@1']:.3f}, {found['seconds']:.0f} s")
            self.write()

    def write(self) -> None:
        """Both files, whole, from what is known now. Nothing before the pilot has said what is run."""
        if self.rates is None:
            return
        results = {**self.results}
        if STUDENT.name in self.found:
            results[STUDENT.name] = dict.fromkeys(range(self.options.seeds), self.found[STUDENT.name])
        traces = {name: models.right_traces(self.work, name) for name in TRACES}
        about = {
            "date": date(), "seeds": self.options.seeds, "at_once": self.options.at_once,
            "failed": self.failed, "packages": packages(),
        }  # fmt: skip
        commands = [place.command for m in self.methods.values() for place in places(m, 0, self.work)]
        page = tables.page(self.methods, results, self.found, traces, self.tried, self.rates, about, commands)
        decided = [
            {"paper": c.paper, "claim": c.text, "verdict": v.word, "numbers": v.why, "rule": c.rule}
            for c, v in tables.verdicts(results)
        ]
        record = {
            "about": about, "models": self.found, "traces": traces, "rates": asdict(self.rates), "pilot": self.tried,
            "claims": decided, "results": results,
        }  # fmt: skip
        replace_file(self.options.out / "papers.md", page)
        replace_file(self.options.out / "papers.json", json.dumps(plain(record), indent=1) + "\n")


def packages() -> dict[str, str]:
    """Versions of what is installed; vLLM's package has another name on CPU."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        for installed in (name, f"{name}-cpu"):
            try:
                found[installed] = version(installed)
                break
            except PackageNotFoundError:
                continue
    return found


def date() -> str:
    from datetime import date

    return str(date.today())


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
