"""benchmarks/papers.py: its statistics, its rules, what it would run, and that nothing finished runs twice."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.config.load import load
from rlkd.core.errors import DataError, PreflightError
from rlkd.data.generators import arithmetic
from rlkd.models.arithmetic import Problem, Split, problems

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import papers  # noqa: E402
import papers_claims as claims  # noqa: E402
import papers_methods as methods  # noqa: E402
import papers_runs as runs  # noqa: E402
import papers_table as tables  # noqa: E402

WORK = "models/papers"


# --- problems with carries


@pytest.mark.parametrize(("left", "right", "carries"), [(123, 456, 0), (105, 106, 1), (999, 999, 3), (555, 545, 3)])
def test_carries_are_the_columns_over_nine(left: int, right: int, carries: int) -> None:
    asked: list[bool] = []
    Problem(left, right).written(lambda: bool(asked.append(False)))
    assert Problem(left, right).carries == carries == len(asked)


def test_the_generator_makes_problems_with_that_many_carries() -> None:
    rows = list(arithmetic("holdout", 50, 0, {"carries": 2}))
    found = [Problem(*map(int, str(row.values["prompt"]).rstrip("=").split("+"))).carries for row in rows]
    assert set(found) == {2, 3}
    without = [p.carries for p in problems(Split.HOLDOUT, 50, 0)]
    assert min(without) < 2


@pytest.mark.parametrize("carries", [-1, 4, True])
def test_a_number_of_carries_that_cannot_be_is_refused(carries: Any) -> None:
    with pytest.raises(DataError, match="does not work with these options"):
        list(arithmetic("train", 1, 0, {"carries": carries}))


def test_more_problems_than_there_are_with_so_many_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.models.arithmetic.OPERANDS", 20)  # 100 to 119: nothing carries three times
    with pytest.raises(PreflightError, match="with at least 3 carries"):
        problems(Split.HOLDOUT, 1, 0, carries=3)


# --- statistics


def test_the_interval_is_students() -> None:
    found = claims.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # sd 1.5811, t(4) 2.776
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert claims.interval([2.0, math.nan]).count == 1
    assert math.isnan(claims.interval([2.0]).low)
    assert math.isnan(claims.interval([]).mean)


def test_the_quantiles_are_students() -> None:
    """The density of Student's t from −q to q holds 95 %."""
    for freedom, quantile in enumerate(claims.T975, start=1):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        x = np.linspace(-quantile, quantile, 20_001)
        assert np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x) == pytest.approx(0.95, abs=1e-4)


def by_seed(metric: str = "pass@1", **of_methods: list[float]) -> claims.Results:
    return {m.replace("_", "-"): {s: {metric: v} for s, v in enumerate(vs)} for m, vs in of_methods.items()}


def test_differences_are_paired_by_seed() -> None:
    """Seeds that are good or bad for both do not hide a small steady difference."""
    results = by_seed(a=[0.1, 0.5, 0.9], b=[0.08, 0.49, 0.88])
    assert claims.paired(results, "a", "b", "pass@1").low > 0
    shifted = by_seed(a=[0.1, 0.5, 0.9], b=[0.49, 0.88, 0.08])  # the same values, other pairs
    assert claims.paired(shifted, "a", "b", "pass@1").low < 0
    one = claims.paired({"a": {0: {"x": 1.0}, 1: {"x": 5.0}}, "b": {1: {"x": 2.0}, 2: {"x": 0.0}}}, "a", "b", "x")
    assert (one.mean, one.count) == (3.0, 1)


# --- rules

CLEAR, SAME, NOISY = [0.5, 0.52, 0.51], [0.3, 0.31, 0.32], [0.1, 0.5, 0.3]


@pytest.mark.parametrize(
    ("a", "b", "word", "why"),
    [
        (CLEAR, SAME, "reproduced", "+0.2"),
        (SAME, CLEAR, "not reproduced", "the opposite: -0.2"),
        (NOISY, SAME, "not reproduced", "no difference beyond noise"),
        (CLEAR[:2], SAME[:2], "not yet known", "2 of at least 3"),
        ([], [], "not yet known", "0 of at least 3"),
        ([1.0] * 3, [0.99] * 3, "cannot be tested at this scale", "ceiling"),
        ([1.0] * 3, [0.97] * 3, "reproduced", "+0.030"),
    ],
)
def test_better(a: list[float], b: list[float], word: str, why: str) -> None:
    verdict = claims.better("a", "b")(by_seed(a=a, b=b))
    assert verdict.word == word
    assert why in verdict.why


def test_a_claim_about_students_that_rarely_succeed_needs_one() -> None:
    rule = claims.where_it_fails(claims.better("a", "b"))
    assert rule(by_seed(a=CLEAR, b=SAME, student=[0.05] * 3)).word == "reproduced"
    assert rule(by_seed(a=CLEAR, b=SAME, student=[0.2] * 3)).word == "cannot be tested at this scale"


def test_level_wants_the_whole_interval_within() -> None:
    assert claims.level("a", "b")(by_seed(a=[0.5, 0.51, 0.5], b=[0.5, 0.5, 0.51])).word == "reproduced"
    assert claims.level("a", "b")(by_seed(a=NOISY, b=[0.3] * 3)).word == "not reproduced"  # mean 0, but anything
    assert claims.level("a", "b")(by_seed(a=CLEAR, b=SAME)).word == "not reproduced"


def test_longest() -> None:
    rule = claims.longest("a", ("b", "c"))
    b, c = [10.0, 10.1, 10.2], [11.0, 11.1, 11.0]
    assert rule(by_seed("length", a=[20.0, 20.1, 20.2], b=b, c=c)).word == "reproduced"
    assert rule(by_seed("length", a=[10.5, 10.6, 10.7], b=b, c=c)).word == "not reproduced"
    assert rule(by_seed("length", a=[10.3, 10.2, 10.1], b=b, c=b)).word == "cannot be tested at this scale"


def test_what_stays_must_have_been_there() -> None:
    def rows(then: list[float], late: list[float]) -> dict[int, dict[str, float]]:
        return {s: {"right_after_off": t, "right_late": x} for s, (t, x) in enumerate(zip(then, late, strict=True))}

    rule, base = claims.stays("a", "b"), rows(SAME, SAME)
    assert rule({"a": rows(CLEAR, CLEAR), "b": base}).word == "reproduced"
    assert rule({"a": rows(CLEAR, SAME), "b": base}).word == "not reproduced"
    assert rule({"a": rows(SAME, CLEAR), "b": base}).word == "cannot be tested at this scale"


def test_every_claim_is_about_methods_that_run() -> None:
    """With numbers for all methods every claim is decided; without those of one method some claim is not."""
    names = [*methods.methods(WORK), "student"]
    metrics = ("pass@1", "pass@8", "length", "right_after_off", "right_late")
    full = {m: {s: dict.fromkeys(metrics, 0.01 * i + 0.001 * s) for s in range(3)} for i, m in enumerate(names)}
    assert all(c.decide(full).word != "not yet known" for c in claims.CLAIMS)
    for name in methods.methods(WORK):
        less = {m: rows for m, rows in full.items() if m != name}
        assert any(c.decide(less).word == "not yet known" for c in claims.CLAIMS), f"no claim looks at {name}"


# --- what would run


def stages() -> list[tuple[str, runs.Place]]:
    every = methods.methods(WORK).values()
    return [(m.key, place) for m in every for place in runs.places(m, 0, Path(WORK))]


@pytest.mark.parametrize("place", [place for _, place in stages()], ids=lambda place: place.directory.name)
def test_every_run_is_a_sound_recipe_with_the_shared_settings(place: runs.Place) -> None:
    config = load(str(ROOT / place.recipe), place.command[2:])
    assert config.name == place.directory.name
    assert config.schedule.steps == place.steps
    for source in (config.data.train, config.data.holdout):
        assert source is not None
        assert source.options["carries"] == methods.CARRIES
    assert (config.evaluate.samples, config.evaluate.k) == (methods.HOLDOUT_SAMPLES, methods.PASS_AT)
    assert config.data.train.seed == config.data.holdout.seed == 0  # the same problems for every seed
    teachers = [t.path for t in config.teachers.values()]
    assert all(path is not None and path.startswith(WORK) for path in teachers)


def test_every_method_has_the_same_number_of_samples() -> None:
    totals: Counter[str] = Counter()
    for key, place in stages():
        c = load(str(ROOT / place.recipe), place.command[2:])
        totals[key] += c.schedule.steps * c.schedule.groups_per_step * c.algorithm.rollout.samples
    assert set(totals.values()) == {methods.STEPS * methods.GROUPS * methods.SAMPLES}


def test_the_second_stage_starts_from_what_the_first_has_made() -> None:
    first, second = runs.places(methods.methods(WORK)["sft-grpo"], 3, Path(WORK))
    assert f"model.path={first.directory}/checkpoints/step-{first.steps:06d}/hf" in second.settings
    assert first.directory != second.directory
    assert first.steps + second.steps == methods.STEPS


def test_other_settings_are_another_run() -> None:
    def name(seed: int = 0, **changes: float) -> str:
        every = methods.methods(WORK, methods.Rates(**changes))
        return runs.places(every["kdrl"], seed, Path(WORK))[0].directory.name

    assert name() == name()
    different = [name(), name(seed=1), name(beta=0.123), name(reward=7e-4)]
    assert len(set(different)) == len(different)
    assert name(imitation=7e-4) == name()  # what it does not use


def test_the_pilot_tries_values_on_a_seed_of_its_own() -> None:
    trials = methods.trials(WORK, [*methods.FIRST, *methods.THEN], methods.Rates(reward=0.007))
    assert methods.PILOT_SEED not in range(methods.SEEDS)
    assert len({t.method.key for t in trials}) == len(trials)
    for trial in trials:
        (place,) = runs.places(trial.method, methods.PILOT_SEED, Path(WORK))
        assert f"{methods.TRIED[trial.rate][1]}={trial.value:g}" in place.settings
        assert "data.holdout.seed=1" in place.settings  # what is chosen is not judged by the problems it was chosen on
        assert ("learner.lr=0.007" in place.settings) == (trial.rate == "beta")  # at the learning rate chosen before


@pytest.mark.parametrize(
    ("tried", "taken"),
    [({1e-4: 0.50, 3e-4: 0.80, 1e-3: 0.10}, 3e-4), ({1e-4: 0.79, 3e-4: 0.80}, 1e-4), ({3e-4: 0.6, 1e-4: 0.1}, 3e-4)],
)
def test_of_about_equal_values_the_smallest_is_taken(tried: dict[float, float], taken: float) -> None:
    assert methods.best(tried) == taken


def test_a_family_has_one_learning_rate() -> None:
    rates = methods.Rates(reward=0.001, imitation=0.002, distillation=0.003, beta=0.4)
    every = methods.methods(WORK, rates).values()
    found = {(m.key, n): s.overrides for m in every for n, s in enumerate(m.stages)}
    for (key, number), own in found.items():
        imitates = key == "sft" or (key, number) == ("sft-grpo", 0)
        expected = 0.002 if imitates else 0.003 if key.startswith("kd-rkl") else 0.001
        assert f"learner.lr={expected}" in own
        assert ("algorithm.beta_0=0.4" in own) == key.startswith("kdrl")
    assert "algorithm.beta_min=0.08" in found["kdrl-annealed", 0]


# --- runs


def finish(place: runs.Place, exit_code: int = 0, **rates: float) -> None:
    """The files of a run, as far as they are read."""
    folder = place.directory
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"attempts": [{"started": 1.0, "ended": 11.0, "exit": exit_code}]}))
    rows = [
        {"step": s, "groups/all_wrong": 1 - s / place.steps, "right": s / place.steps, "guided": None,
         "batch/samples": 64.0} for s in range(1, place.steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"step": place.steps, "estimates": [], "eval/length": 30.0, "eval/pass@4": None}
    found |= {f"eval/{k}": v for k, v in {"pass@1": 0.25, "pass@8": 0.5, **rates}.items()}
    runs.evaluation_file(place).write_text(json.dumps(found))
    (folder / "greedy.json").write_text('{"greedy": 0.125}')


class Scripted(runs.Runner):
    """Children that do what they are told, in order, instead of training."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.calls: list[str] = []
        self.codes: Iterator[int] = itertools.repeat(0)

    def rate(self, name: str) -> float:
        """Held-out pass@1: the pilot is to choose 3e-4 and 0.05."""
        return 0.75 if "-0.0003-" in name or "-0.05-" in name else 0.25

    def rlkd(self, arguments: Any, log: Path, out: Path | None = None) -> int:
        self.calls.append(log.stem)
        code = next(self.codes)
        if code == 0:
            directory = self.work / "runs" / log.stem
            finish(runs.Place(directory, "", (), methods.STEPS), **{"pass@1": self.rate(log.stem)})
        return code


def test_what_is_finished_never_runs_again(tmp_path: Path) -> None:
    runner, grpo = Scripted(tmp_path), methods.methods(str(tmp_path))["grpo"]
    first, second = runner.run(grpo, 0), runner.run(grpo, 0)
    assert len(runner.calls) == 1
    assert str(first) == str(second)  # NaN is not equal to itself


def test_a_run_that_ended_badly_is_asked_to_go_on_once(tmp_path: Path) -> None:
    runner, grpo = Scripted(tmp_path), methods.methods(str(tmp_path))["grpo"]
    runner.codes = iter([4, 0])
    assert runner.run(grpo, 0)["pass@1"] == 0.25
    runner = Scripted(tmp_path / "other")
    runner.codes = iter([4, 4, 0])
    with pytest.raises(runs.Failed, match=r"ended with 4: see .*grpo-seed0"):
        runner.run(methods.methods(str(tmp_path / "other"))["grpo"], 0)
    assert len(runner.calls) == 2


@pytest.mark.parametrize("how", ["no folder", "failed", "under way", "no evaluation"])
def test_what_is_not_finished(tmp_path: Path, how: str) -> None:
    (place,) = runs.places(methods.methods(str(tmp_path))["grpo"], 0, tmp_path)
    if how != "no folder":
        finish(place, exit_code=4 if how == "failed" else 0)
        assert runs.finished(place) == (how != "failed")
    if how == "under way":
        (place.directory / "run.json").write_text(json.dumps({"attempts": [{"started": 1.0}]}))
    if how == "no evaluation":
        runs.evaluation_file(place).unlink()
    assert not runs.finished(place)


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    (place,) = runs.places(methods.methods(str(tmp_path))["grpo"], 0, tmp_path)
    finish(place)
    found, n = runs.outcome([place]), place.steps
    assert (found["pass@1"], found["pass@8"], found["greedy"], found["length"]) == (0.25, 0.5, 0.125, 30.0)
    assert math.isnan(found["pass@4"])
    assert math.isnan(found["guided"])
    assert found["all_wrong_start"] == pytest.approx(1 - 3 / n)  # steps 1 to 5
    assert found["all_wrong_end"] == pytest.approx(2 / n)  # the last five
    off = runs.SWITCH_OFF
    assert found["right_after_off"] == pytest.approx((off + 4.5) / n)  # 8 steps, the first after switch-off is off + 1
    assert found["right_late"] == pytest.approx((n - 3.5) / n)
    assert (found["samples"], found["seconds"]) == (64 * n, 10.0)


def test_the_teacher_is_off_where_the_recipe_switches_it_off() -> None:
    (place,) = runs.places(methods.methods(WORK)["thinktuning"], 0, Path(WORK))
    algorithm = load(str(ROOT / place.recipe), place.command[2:]).algorithm
    shares = [algorithm.knobs(step, {})["feedback_pct"] for step in range(methods.STEPS)]
    assert [share > 0 for share in shares] == [step < runs.SWITCH_OFF for step in range(methods.STEPS)]
    assert 0 < runs.SWITCH_OFF < methods.STEPS - 2 * runs.WINDOW


def test_a_child_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "STOP_TIMEOUT_S", 0.2)
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"on\n"
    assert runs.end(child) == -9


# --- the page and the whole


ABOUT = {"date": "2026-01-01", "seeds": 1, "at_once": 2, "failed": [], "packages": {"rlkd": "0"}}


def page(results: dict[str, Any]) -> str:
    traces, pilot = {"peer": {"peer": 0.5, "any": 0.5}}, [{"rate": "reward", "value": 1e-4, **RATE}]
    return tables.page(methods.methods(WORK), results, {}, traces, pilot, methods.Rates(), ABOUT, [["train"]])


RATE = {"pass@1": 0.5, "greedy": 0.25, "pass@8": 0.75}


def test_a_stopped_benchmark_says_that_it_is_partial() -> None:
    rows = {0: {**RATE, "length": 30.0, "all_wrong_start": 0.9}}
    every = dict.fromkeys(methods.methods(WORK), rows)
    assert "**Partial: 1 of 14 runs.**" in page({"grpo": rows})
    assert "Partial" not in page(every)
    assert "| GRPO | 1 | 0.500 | 0.250 | 0.750 | 30.0 |" in page(every)
    assert "| grpo | learner.lr | 0.0001 | 0.500 | 0.250 | 0.750 | **taken** |" in page({})
    assert page({}).count("**not yet known**") == len(claims.CLAIMS) - 1  # all but what no number could decide


@pytest.fixture
def benchmark_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> papers.Benchmark:
    """A benchmark whose children are scripted."""
    options = papers.parsed(["--seeds", "1", "--methods", "grpo", "kdrl"])
    options.work, options.out = tmp_path / "work", tmp_path / "out"
    options.work.mkdir()
    monkeypatch.setattr(papers, "evaluate_model", lambda *_: {"pass@1": 0.05, "greedy": 0.0, "pass@8": 0.3})
    monkeypatch.setattr(papers.models, "right_traces", lambda *_: {"peer": 0.5, "any": 0.5})
    monkeypatch.setattr(papers.signal, "signal", lambda *_: None)
    benchmark = papers.Benchmark(options)
    benchmark.runner = Scripted(options.work)
    return benchmark


def scripted(benchmark: papers.Benchmark) -> Scripted:
    assert isinstance(benchmark.runner, Scripted)
    return benchmark.runner


def test_both_files_are_written_after_every_run(benchmark_here: papers.Benchmark) -> None:
    assert benchmark_here.run() == 0
    record = json.loads((benchmark_here.options.out / "papers.json").read_text())
    assert record["rates"] == {"reward": 3e-4, "imitation": 3e-4, "distillation": 3e-4, "beta": 0.05}
    assert len(record["pilot"]) == 12
    assert set(record["results"]) == {"grpo", "kdrl", "student"}
    assert record["results"]["grpo"]["0"]["pass@1"] == 0.25
    assert record["results"]["grpo"]["0"]["guided"] is None  # unknown, not 0
    assert "Partial: 2 of 14" in (benchmark_here.options.out / "papers.md").read_text()
    assert len(scripted(benchmark_here).calls) == 14
    again = papers.Benchmark(benchmark_here.options)
    again.runner = Scripted(again.work)
    assert again.run() == 0
    assert again.runner.calls == []


def test_the_pilot_alone(benchmark_here: papers.Benchmark) -> None:
    benchmark_here.options.pilot = True
    assert benchmark_here.run() == 0
    assert all(name.startswith("pilot-") for name in scripted(benchmark_here).calls)
    assert "Partial: 0 of 14" in (benchmark_here.options.out / "papers.md").read_text()


def test_nothing_is_chosen_from_a_pilot_with_a_failed_run(benchmark_here: papers.Benchmark) -> None:
    scripted(benchmark_here).codes = itertools.chain([4, 4], itertools.repeat(0))
    benchmark_here.options.at_once = 1
    assert benchmark_here.run() == 1
    assert len(scripted(benchmark_here).calls) == 2 + 8  # the first twice; no β, no method
    assert not (benchmark_here.options.out / "papers.md").exists()


def test_one_failed_run_does_not_end_the_others(benchmark_here: papers.Benchmark) -> None:
    benchmark_here.options.at_once = 1
    scripted(benchmark_here).codes = itertools.chain([0] * 12, [4, 4, 0])
    assert benchmark_here.run() == 1
    written = (benchmark_here.options.out / "papers.md").read_text()
    assert "**Failed:** grpo, seed 0: grpo-seed0" in written
    assert set(benchmark_here.results) == {"kdrl"}


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        papers.parsed(["--methods", "grop"])
    assert "there is no method `grop`" in capsys.readouterr().err


# --- the real path


@pytest.mark.stack
@pytest.mark.long
def test_a_method_runs_on_the_real_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of six steps each: `rlkd train`, its files, the second from the first's exported model."""
    from rlkd.models.get import get

    monkeypatch.chdir(ROOT)
    for name in ("student", "teacher"):
        get("tiny", tmp_path / name)
    few = {"TRAIN": 64, "HOLDOUT": 16}
    for module, name in itertools.product((methods, papers.models), few):
        monkeypatch.setattr(module, name, few[name])
    monkeypatch.setattr(methods, "STEPS", 12)  # learner.warmup_steps of the recipe is 5
    monkeypatch.setattr(methods, "ENGINE", "hf")
    monkeypatch.setattr(papers.models, "TRACES", {"teacher": (methods.TEACHER,)})
    papers.models.make_traces(tmp_path)
    method = methods.methods(str(tmp_path))["sft-grpo"]
    assert [stage.steps for stage in method.stages] == [6, 6]
    found = runs.Runner(tmp_path).run(method, 0)
    assert 0 <= found["pass@1"] <= found["pass@8"] <= 1
    assert 0 <= found["greedy"] <= 1
    assert found["samples"] == 12 * methods.GROUPS * methods.SAMPLES
