"""Space files: what may come out of a distribution, and what is told before a trial starts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.config.stages import Stage
from rlkd.config.stages import load as load_stages
from rlkd.core.errors import ConfigError
from rlkd.sweep.check import _rules, checked
from rlkd.sweep.spec import KINDS, Spec, combinations, overrides, written
from tests.sweep_help import EVERY, problems, read, recipe, space_file


@pytest.mark.parametrize(
    ("kind", "values", "corners"),
    [
        ("uniform", (1, 4), [1.0, 4.0]),
        ("loguniform", (1e-6, 1e-4), [1e-6, 1e-4]),
        ("quniform", (0.2, 0.6, 0.1), [0.2, 0.6]),
        ("randint", (1, 4), [1, 3]),
        ("lograndint", (1, 100), [1, 99]),
        ("qrandint", (2, 8, 2), [2, 8]),
        ("normal", (0.5, 0.1), [0.5 - 4 * 0.1, 0.5 + 4 * 0.1]),
        ("choice", ("a", None, 3), ["a", None, 3]),
    ],
)
def test_corners(kind: str, values: tuple[object, ...], corners: list[object]) -> None:
    spec = Spec(kind, values)
    assert spec.problem() is None
    assert spec.corners() == corners
    assert [type(c) for c in spec.corners()] == [type(c) for c in corners]


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("uniform", (1,), "takes 2 numbers"),
        ("uniform", (2, 1), "low=2 must be below high=1"),
        ("uniform", ("a", 1), "low must be a number"),
        ("uniform", (0, math.inf), "high must be a number"),
        ("loguniform", (0, 1), "above 0, or it has no logarithm"),
        ("randint", (1, 2.5), "high must be a whole number"),
        ("randint", (True, 4), "low must be a number"),
        ("quniform", (0, 1, 2), "at most high − low"),
        ("quniform", (0, 1, 0.3), "must be multiples of q=0.3"),
        ("normal", (0, 0), "deviation must be above 0"),
        ("choice", (), "nothing to choose from"),
    ],
)
def test_what_is_no_distribution(kind: str, values: tuple[object, ...], says: str) -> None:
    assert says in str(Spec(kind, values).problem())


NUMBERS = {
    "uniform": (0.5, 2),
    "quniform": (0.5, 2, 0.5),
    "loguniform": (0.001, 2),
    "qloguniform": (0.5, 2, 0.5),
    "randint": (1, 9),
    "lograndint": (1, 9),
    "qrandint": (2, 8, 2),
    "normal": (1, 0.1),
}


@given(st.sampled_from(sorted(NUMBERS)), st.floats(-10, 10))
@settings(max_examples=200, deadline=None)
def test_what_was_multiplied_is_put_back_inside(kind: str, value: float) -> None:
    spec = Spec(kind, NUMBERS[kind])
    low, high = spec.corners()
    found = spec.nearest(value)
    assert low <= found <= high
    assert type(found) is type(low)
    assert spec.nearest(found) == found
    if len(spec.values) == 3:
        assert math.isclose(found / spec.values[2], round(found / spec.values[2]), abs_tol=1e-9)


@pytest.mark.parametrize(
    "value", ["true", "1.0", "a b", "off", "", "[x", "null", "1e-5", True, None, 3, 1e-5, 0.1, "täglich"]
)
def test_what_is_written_is_read_back(tmp_path: Path, value: object) -> None:
    line = f"sampler.value={written(value)}"
    from rlkd.config.places import Found
    from rlkd.config.recipe import parts

    path = tmp_path / "empty.yaml"
    path.write_text("{}")
    _, (section,) = parts(str(path), [line], Found())
    assert section["sampler"].value["value"].value == value  # type: ignore[index,union-attr,call-overload]


def test_numbers_of_numpy_are_written_as_ours() -> None:
    assert overrides({"a": np.float64(1e-5), "b": np.int64(3), "c": np.bool_(True)}) == ["a=1e-05", "b=3", "c=true"]


def test_combinations_are_the_ends_and_some_between_each_once() -> None:
    specs = {"a": Spec("uniform", (0, 1)), "b": Spec("choice", (1, 2, 3))}
    found = combinations(specs, 4)
    assert found[:2] == [{"a": 0.0, "b": 1}, {"a": 1.0, "b": 3}]
    assert len(found) == 4
    assert len({json.dumps(one) for one in combinations(specs, 100)}) == len(combinations(specs, 100)) <= 6
    assert combinations(specs, 4) == found


def test_a_space_is_read_with_its_settings(tmp_path: Path) -> None:
    space = read(
        tmp_path, "sweep: {trials: 3, scheduler: asha, reduction: 2}\nlearner.lr: {loguniform: [1e-6, 1e-4]}\n"
    )
    assert (space.trials, space.settings.scheduler, space.settings.reduction) == (3, "asha", 2.0)
    assert space.specs == {"learner.lr": Spec("loguniform", (1e-6, 1e-4))}
    assert space.place("learner.lr").where.endswith("space.yaml:2:1")


def test_a_grid_has_a_trial_for_each_point(tmp_path: Path) -> None:
    space = read(tmp_path, "sweep: {search: grid}\na: {grid: [1, 2, 3]}\nb: {choice: [4, 5]}\n")
    assert space.trials == 6


WRONG = [
    ("learner.lrr: {uniform: [1.0e-6, 1.0e-4]}", "RLKD-C002", "learner.lrr"),
    ("learner.lr: {uniform: [0, 1.0e-4]}", "RLKD-C012", "learner.lr=0.0: must be above 0"),
    ("learner.betas: {choice: [[0.9, 2.0]]}", "RLKD-C012", "must be at least 0 and below 1"),
    ("sampler.max_tokens: {uniform: [8, 48]}", "RLKD-C003", "sampler.max_tokens"),
    ("sampler.engine: {choice: [hf, vlm]}", "RLKD-C003", "sampler.engine"),
    ("learner.weight_decay: {uniform: [1.0e-4]}", "RLKD-C602", "takes 2 numbers"),
    ("learner.warmup_steps: {unifrom: [1, 4]}", "RLKD-C602", "no distribution `unifrom`"),
    ("learner.max_grad_norm: 1.0", "RLKD-C602", "must be one distribution"),
    ("schedule.steps: {uniform: 3}", "RLKD-C602", "takes a list"),
    ("name: {choice: [a, b]}", "RLKD-C601", "each trial gets its own"),
    ("report.directory: {choice: [a, b]}", "RLKD-C601", "cannot differ between trials"),
    ("evaluate.samples: {choice: [1, 2]}", "RLKD-C601", "trials are compared by it"),
    ("sweep:", "", ""),
    ("  trails: 3", "RLKD-C603", "unknown key `sweep.trails`"),
    ("  trials: 0", "RLKD-C603", "must be at least 1"),
    ("  at_once: many", "RLKD-C603", "a whole number"),
    ("  mode: best", "RLKD-C603", "one of max, min"),
    ("  metric: eval/pass@2", "RLKD-C604", "reports no such number"),
]


def test_everything_that_is_wrong_is_told_at_once_and_at_its_line(tmp_path: Path) -> None:
    """And the recipe's own problems come first, alone: every value would have them again."""
    text = "\n".join(line for line, _, _ in WRONG)
    found = problems(tmp_path, text)
    for number, (line, code, says) in enumerate(WRONG, 1):
        here = [p for p in found if f"space.yaml:{number}:" in str(p.where)]
        assert [p.code for p in here] == ([code] if code else []), (line, [str(p) for p in here])
        assert says in "".join(p.what for p in here)
    assert len(found) == len(WRONG) - 1
    fixes = {p.where: str(p.fix) for p in found}
    assert any(":1:" in str(where) and "`lr`" in fix for where, fix in fixes.items())  # did you mean
    assert any(":4:" in str(where) and "randint" in fix for where, fix in fixes.items())
    assert {p.code for p in problems(tmp_path, text, [*EVERY, "learner.lr=-1"])} == {
        "RLKD-C012", "RLKD-C601", "RLKD-C602", "RLKD-C603"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("{}", "RLKD-C605", "the space is empty"),
        ("sweep: {trials: 3}", "RLKD-C605", "the space is empty"),
        ("learner.lr: {uniform: [1e-6", "RLKD-C005", "cannot be read as yaml"),
    ],
)
def test_a_file_with_nothing_to_search_over(tmp_path: Path, text: str, code: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    (problem,) = error.value.problems
    assert problem.code == code
    assert says in problem.what
    assert "space.yaml" in str(problem.where)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    return load_stages(recipe(tmp_path_factory.mktemp("recipe")), EVERY)


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("seed: {grid: [1, 2]}", "seed", "grid, but sweep.search=random"),
        ("sweep: {search: grid}\nlearner.lr: {uniform: [1e-6, 1e-4]}", "learner.lr", "is no list"),
        ("sweep: {scheduler: pbt}\nseed: {choice: [1, 2]}", "seed", "cannot be searched by pbt"),
        ("sweep: {scheduler: pbt, trials: 1}\nlearner.lr: {uniform: [1e-6, 1e-4]}", "sweep.trials", "nobody to copy"),
        (
            "sweep: {scheduler: pbt, search: grid}\nlearner.lr: {grid: [1e-4, 2e-4]}",
            "sweep.search",
            "pbt draws for itself",
        ),
        ("sweep: {search: optuna}\nlearner.lr: {normal: [1e-3, 1e-4]}", "learner.lr", "Optuna does not take"),
    ],
)
def test_settings_that_do_not_go_with_the_space(
    tmp_path: Path, stages: list[Stage], text: str, key: str, says: str
) -> None:
    ((where, what, _),) = _rules(read(tmp_path, text), stages)
    assert where == key
    assert says in what


def test_keys_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    """Each value is right alone: evaluate wants the end, and no number of steps is wrong; curriculum.low < high."""
    text = "curriculum.low: {uniform: [0.05, 0.9]}\ncurriculum.high: {uniform: [0.1, 0.95]}\n"
    found = problems(tmp_path, text, [*EVERY, "curriculum.name=difficulty"])
    assert [p.code for p in found] == ["RLKD-C011"]
    assert "(with curriculum.low=0.9 curriculum.high=0.1)" in found[0].what


@pytest.mark.parametrize(
    ("text", "given", "changes", "says"),
    [
        ("sweep: {scheduler: asha}", [], {}, "evaluate.every is 0"),
        ("", [], {"evaluate": {"at_end": False}}, "evaluates nothing after the start"),
        ("", [], {"data": {"holdout": None}, "evaluate": {"at_start": False, "at_end": False}}, "no data.holdout"),
        ("sweep: {scheduler: pbt}", EVERY, {"stages": [{"name": "one"}, {"name": "two"}]}, "the recipe has stages"),
    ],
)
def test_recipes_that_cannot_be_compared_or_copied(
    tmp_path: Path, text: str, given: list[str], changes: dict[str, object], says: str
) -> None:
    space = read(tmp_path, f"{text}\nlearner.lr: {{uniform: [1e-6, 1e-4]}}\n")
    ((_, what, _),) = _rules(space, load_stages(recipe(tmp_path, **changes), given))
    assert says in what


def test_the_command_line_s_numbers_stand_in(tmp_path: Path) -> None:
    path = space_file(tmp_path, "sweep: {trials: 8}\nlearner.lr: {uniform: [1e-6, 1e-4]}\n")
    space = checked(recipe(tmp_path), EVERY, path, trials=2, at_once=3)
    assert (space.trials, space.settings.at_once) == (2, 3)
    with pytest.raises(ConfigError, match="--at-once 0: must be at least 1"):
        checked(recipe(tmp_path), EVERY, path, at_once=0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the space file"):
        checked(recipe(tmp_path), EVERY, str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", ["grpo-tiny", "grpo-tiny-pbt"])
def test_the_spaces_that_ship_fit_their_recipe(name: str) -> None:
    space = checked("configs/grpo-tiny.yaml", ["evaluate.every=10"], f"configs/sweep/{name}.yaml")
    assert space.trials >= 4


def test_every_kind_is_known_to_ray() -> None:
    from rlkd.sweep.search import DOMAINS

    assert set(KINDS) == {*DOMAINS, "choice", "grid"}
