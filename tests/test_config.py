"""Recipes: how they are read, and that every mistake in one is found, at its place, with what to do."""

import copy
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlkd.algorithms import TABLE, algorithm
from rlkd.algorithms.dapo import DAPO
from rlkd.config import kinds
from rlkd.config.contradictions import findings
from rlkd.config.load import check, load, resolved
from rlkd.config.places import one_edit_apart, similar
from rlkd.config.ranges import RANGES, TEACHER
from rlkd.config.schema import Config, LearnerConfig, Source, TeacherConfig
from rlkd.core.errors import ConfigError, Problem

RECIPE = """\
name: a-run
model: {path: models/tiny}
algorithm:
  name: grpo
  rollout:
    samples: 4
data:
  train: {kind: arithmetic, size: 1000}
  holdout: {kind: arithmetic, size: 50, split: holdout}
rewards:
  arithmetic:
    weight: 1.0
schedule: {steps: 10, groups_per_step: 4}
learner:
  lr: 1e-6
  betas: [0.9, 0.99]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe into the current folder, so that messages name it without a path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = RECIPE, name: str = "recipe.yaml") -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return write


def problems(path: Path, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def problem(path: Path, *overrides: str) -> Problem:
    (one,) = problems(path, *overrides)
    return one


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_recipe_becomes_frozen_dataclasses(write: Write) -> None:
    config = load(write(RECIPE.replace("grpo", "dapo")))
    assert isinstance(config, Config)
    assert isinstance(config.algorithm, DAPO)
    assert config.algorithm.rollout.samples == 4
    assert config.rewards["arithmetic"].weight == 1.0
    assert config.learner == LearnerConfig(lr=1e-6, betas=(0.9, 0.99))
    assert config.data.holdout == Source(kind="arithmetic", size=50, split="holdout")
    with pytest.raises(AttributeError):
        config.algorithm.beta = 1.0  # type: ignore[misc]


def test_defaults_are_merged_in_order_and_own_keys_win(write: Write) -> None:
    write("learner: {lr: 1e-3, weight_decay: 0.1}\nevaluate: {k: [1, 2], samples: 4, temperature: 1.0}", "base.yaml")
    write("defaults: [../base]\nlearner: {lr: 1e-4, max_grad_norm: 2}", "model/small.yaml")
    text = "defaults: [base, model/small]\n" + RECIPE + "evaluate: {k: [4]}\n"
    config = load(write(text), ["learner.warmup_steps=3", "evaluate={every: 2}"])
    assert (config.learner.lr, config.learner.weight_decay, config.learner.max_grad_norm) == (1e-6, 0.1, 2.0)
    assert (config.learner.warmup_steps, config.evaluate.every) == (3, 2)
    assert config.evaluate.k == (4,)  # a list is replaced, not joined
    assert config.evaluate.samples == 4


def test_yaml_does_not_surprise(write: Write) -> None:
    options = "{a: off, b: 1:30, c: 2024-01-02, d: 1e3, e: 010, f: yes, g: 0x10, h: ~}"
    text = RECIPE.replace("size: 1000", f"size: 1000, options: {options}").replace("name: a-run", "name: 1.10")
    config = load(write(text + "report: {wandb: off, tensorboard: false}"))
    assert config.report.wandb == "off"
    assert config.name == "1.10"
    assert config.data.train.options == {
        "a": "off", "b": "1:30", "c": "2024-01-02", "d": 1000.0, "e": "010", "f": "yes", "g": 16, "h": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("model.system=Answer: briefly # and well", lambda c: c.model.system),
        ("model.system=", lambda c: c.model.system),
        ("model.system=null", lambda c: c.model.system),
        ('model.system="null"', lambda c: c.model.system),
        ("evaluate.k=[1]", lambda c: c.evaluate.k),
        ("rewards.arithmetic.weight=-2", lambda c: c.rewards["arithmetic"].weight),
        ("teachers.big.path=/models/big", lambda c: c.teachers["big"]),
        ("name=a=b", None),
    ],
)
def test_overrides(write: Write, override: str, read: Callable[[Config], Any] | None) -> None:
    if read is None:
        assert problem(write(), override).code == "RLKD-C011"
        return
    expected = {
        "model.system=Answer: briefly # and well": "Answer: briefly # and well",
        "model.system=": "",
        "model.system=null": None,
        'model.system="null"': "null",
        "evaluate.k=[1]": (1,),
        "rewards.arithmetic.weight=-2": -2.0,
        "teachers.big.path=/models/big": TeacherConfig(path="/models/big"),
    }
    assert read(load(write(), [override])) == expected[override]


def test_interpolations(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "7")
    text = RECIPE.replace("grpo", "dr_grpo").replace("steps: 10", "steps: '${oc.env:STEPS}'")
    config = load(write(text), ["algorithm.norm_length=${sampler.max_tokens}"])
    assert config.schedule.steps == 7
    assert config.algorithm.norm_length == 256


def test_a_reward_of_ones_own(write: Write) -> None:
    write("def short(prompt, answer, words: int = 5) -> float:\n    return 1.0\n", "mine/rewards.py")
    text = RECIPE.replace("  arithmetic:\n", "  mine/rewards.py:short:\n")
    config = load(write(text), ["rewards.mine/rewards.py:short.words=9"])
    (reward,) = config.rewards.values()
    assert (reward.words, reward.weight) == (9, 1.0)
    assert (
        problem(write(text), "rewards.mine/rewards.py:short.wrds=9").fix
        == "did you mean `words`?  (also known here: weight)"
    )


def test_an_algorithm_of_ones_own(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dataclasses import dataclass\nfrom rlkd.algorithms.grpo import GRPO\n"
        "@dataclass(frozen=True)\nclass Mine(GRPO):\n    name: str = 'mine'\n    extra: float = 1.0\n"
        "class Plain: ...\n@dataclass\nclass Half:\n    name: str = ''\n"
    )
    write(source, "my_algorithm_for_this_test.py")
    write("1 / 0\n", "my_broken_algorithm.py")
    monkeypatch.syspath_prepend(os.getcwd())
    module = "my_algorithm_for_this_test"
    config = load(write(RECIPE.replace("grpo", f"{module}:Mine")), ["algorithm.extra=2"])
    assert (type(config.algorithm).__name__, config.algorithm.extra) == ("Mine", 2.0)
    again = write(resolved(config), "again.yaml")
    assert load(again) == config
    for name, message in {
        f"{module}:Mime": f"did you mean `{module}:Mine`?",
        f"{module}:Plain": "is no dataclass",
        f"{module}:Half": "lacks rollout, guidance",
        "my_broken_algorithm:X": "ZeroDivisionError: division by zero",
        "no_such_module:X": "No module named 'no_such_module'",
    }.items():
        assert message in str(problem(write(), f"algorithm.name={name}"))


@pytest.mark.parametrize("name", TABLE)
def test_every_algorithm_of_the_table(name: str) -> None:
    cls = algorithm(name)
    assert cls().name == name


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.faults("F61")
def test_the_message_is_as_promised(write: Write) -> None:
    """reliability_ux.md D2."""
    text = RECIPE.replace("    samples: 4\n", "    samples: 4\n  clip_hig: 0.3\n").replace(
        "name: grpo\n", "name: cispo\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(write(text))
    others = ", ".join(f.name for f in fields(algorithm("cispo")) if f.name != "clip_high")
    assert str(caught.value) == (
        "error[RLKD-C002]: unknown key `algorithm.clip_hig`: the algorithm cispo has no such setting\n"
        "  --> recipe.yaml:7:3\n"
        "  |\n"
        "7 |   clip_hig: 0.3\n"
        f"  |   ^^^^^^^^ did you mean `clip_high`?  (also known here: {others})"
    )


@pytest.mark.faults("F62")
def test_every_problem_is_reported_at_once_in_order(write: Write) -> None:
    write("learner: {lr: fast}\n", "base.yaml")
    text = "defaults: [base]\n" + RECIPE.replace("  lr: 1e-6\n", "  rnks: 2\n").replace(
        "arithmetic:\n", "arithmatic:\n"
    )
    text = text.replace("schedule:", "shedule:") + "sampler: {top_p: 0.5}\nseed: -1\nseed: 2\n"
    found = problems(write(text), "report.wandb=sometimes", "sampler.temperature=0")
    assert [(p.code, p.where) for p in found] == [
        ("RLKD-C301", "recipe.yaml:12:3"),
        ("RLKD-C002", "recipe.yaml:14:1"),
        ("RLKD-C002", "recipe.yaml:16:3"),
        ("RLKD-C011", "recipe.yaml:18:11"),
        ("RLKD-C012", "recipe.yaml:19:1"),
        ("RLKD-C006", "recipe.yaml:20:1"),
        ("RLKD-C003", "base.yaml:1:11"),
        ("RLKD-C003", "command line: report.wandb=sometimes"),
        ("RLKD-C012", "command line: sampler.temperature=0"),
    ]


@pytest.mark.parametrize(
    ("change", "code", "where", "said"),
    [
        # unknown keys
        ({"learner:": "lerner:"}, "C002", "14:1", "did you mean `learner`?"),
        ({"  lr: 1e-6": "  learning_rate: 1"}, "C002", "15:3", "known here: ranks, lr"),
        ({"  lr: 1e-6": "  temperature: 1"}, "C002", "15:3", "`sampler.temperature` or `evaluate.temperature`"),
        ({"    samples: 4": "    sampels: 4"}, "C002", "6:5", "did you mean `samples`?"),
        ({"  rollout:": "  overlong_max: 1\n  rollout:"}, "C002", "5:3", "has no such setting (it is one of dapo)"),
        ({"weight: 1.0": "wieght: 1.0"}, "C002", "12:5", "did you mean `weight`?"),
        ({"name: grpo": "name: gropo"}, "C010", "4:3", "did you mean `grpo`?"),
        ({"name: grpo": "name: [1]"}, "C010", "4:3", "no algorithm named `a list of 1`"),
        ({"arithmetic:\n": "arithmetics:\n"}, "C301", "11:3", "did you mean 'arithmetic'?"),
        # types
        ({"steps: 10": "steps: ten"}, "C003", "13:12", "must be a whole number, not `ten`"),
        ({"steps: 10": "steps: 10.5"}, "C003", "13:12", "must be a whole number, not `10.5`"),
        ({"steps: 10": 'steps: "10"'}, "C003", "13:12", "must be a whole number, not `10`"),
        ({"steps: 10": "steps: true"}, "C003", "13:12", "must be a whole number, not `true`"),
        ({"steps: 10": "steps: [10]"}, "C003", "13:12", "must be a whole number, not a list of 1"),
        ({"steps: 10": "steps: {a: 10}"}, "C003", "13:12", "must be a whole number, not a section"),
        ({"steps: 10": "steps:"}, "C003", "13:12", "must be a whole number, not nothing"),
        ({"lr: 1e-6": "lr: true"}, "C003", "15:3", "must be a number, not `true`"),
        ({"lr: 1e-6": "offload: 1"}, "C003", "15:3", "must be true or false, not `1`"),
        ({"lr: 1e-6": "lr_schedule: cosin"}, "C003", "15:3", "one of constant, linear, cosine, not `cosin`"),
        ({"lr: 1e-6": "lr_schedule: cosin"}, "C003", "15:3", "did you mean `cosine`?"),
        ({"lr: 1e-6": "zero_stage: 7"}, "C003", "15:3", "must be one of 0, 1, 2, 3 or null, not `7`"),
        ({"[0.9, 0.99]": "[0.9]"}, "C003", "16:3", "must be a list of 2 numbers, not a list of 1"),
        ({"[0.9, 0.99]": "0.9"}, "C003", "16:3", "must be a list of 2 numbers, not `0.9`"),
        ({"[0.9, 0.99]": "[0.9, x]"}, "C003", "16:3", "must be a list of 2 numbers"),
        ({"model: {path: models/tiny}": "model: models/tiny"}, "C003", "2:1", "must be a section (path, context"),
        ({"    samples: 4": "    # samples: 4"}, "C003", "5:3", "the section `algorithm.rollout` is empty"),
        ({"    weight: 1.0\n": ""}, "C003", "11:3", "write `arithmetic: {}` for its defaults"),
        ({"rewards:\n  arithmetic:\n    weight: 1.0": "rewards: [exact]"}, "C003", "10:1", "of keys, not a list of 1"),
        ({"learner:": "teachers: {big: /models/big}\nlearner:"}, "C003", "14:12", "write `big: {}`"),
        # missing
        ({"path: models/tiny": ""}, "C004", "2:1", "`model.path` is missing"),
        ({"model: {path: models/tiny}\n": ""}, "C004", "", "`model.path` is missing"),
        ({"  name: grpo\n": ""}, "C004", "3:1", "`algorithm.name` is missing"),
        ({"  name: grpo\n": "  name:\n"}, "C004", "3:1", "one of grpo, dr_grpo, dapo"),
        ({"rewards:\n  arithmetic:\n    weight: 1.0\n": ""}, "C004", "", "there are no rewards"),
        ({"rewards:\n  arithmetic:\n    weight: 1.0": "rewards: {}"}, "C004", "10:1", "there are no rewards"),
        ({"  arithmetic:\n    weight: 1.0": "  regex: {}"}, "C004", "11:3", "`rewards.regex.pattern` is missing"),
        # yaml
        ({"name: a-run": "name: [a-run"}, "C005", "2:6", "cannot be read as yaml"),
        ({"steps: 10": "steps: ${seed}"}, "C005", "13:20", "an interpolation needs quotes"),
        ({"    samples: 4": "\tsamples: 4"}, "C005", "6:1", "cannot be read as yaml: found character"),
        ({"name: a-run": "name: !!python/object:os.system x"}, "C005", "1:7", "is not known here"),
        ({"name: a-run": "name: !!int x"}, "C005", "1:7", "no int: 'x'"),
        ({"name: a-run": "name: &a [*a]"}, "C005", "1:7", "an alias inside of what it stands for"),
        ({"name: a-run": "name: \x01"}, "C005", "1:7", "special characters are not allowed: '\\x01'"),
        ({"name: a-run": "[a]: b"}, "C005", "1:1", "a key must be a word"),
        ({"name: a-run": "<<: {a: b}"}, "C005", "1:1", "to take over other keys, use `defaults`"),
        ({"name: a-run": "- a"}, "C005", "2:1", "cannot be read as yaml"),
        ({"name: a-run": "--- a\n---"}, "C005", "2:1", "expected a single document"),
        ({"    samples: 4": "    samples: 4\n    samples: 5"}, "C006", "7:5", "the first is at recipe.yaml:6:5"),
        # defaults
        ({"name: a-run": "defaults: base"}, "C007", "1:1", "must be a list of names of recipes"),
        ({"name: a-run": "defaults: [1]"}, "C007", "1:1", "must be a list of names of recipes"),
        ({"name: a-run": "defaults: [recip]"}, "C007", "1:12", "did you mean `recipe.yaml`?"),
        ({"name: a-run": "defaults: [recipe]"}, "C007", "1:12", "in a circle: recipe.yaml → recipe.yaml"),
        # interpolations
        ({"lr: 1e-6": "lr: ${oc.env:NOT_SET_HERE}"}, "C009", "15:3", "export NOT_SET_HERE="),
        ({"lr: 1e-6": "lr: ${learner.lrr}"}, "C009", "15:3", "did you mean `learner.lr`?"),
        ({"lr: 1e-6": "lr: ${learner.lr}"}, "C009", "15:3", "it comes back to itself"),
        ({"lr: 1e-6": "lr: ${name}"}, "C009", "15:3", "must be a number; what `${name}` stands for is not"),
        ({"lr: 1e-6": "lr: ${"}, "C009", "15:3", "an interpolation that cannot be read"),
        ({"lr: 1e-6": "lr: ${nope:1}"}, "C009", "15:3", "cannot be resolved"),
        # a reward's own complaints
        ({"  arithmetic:\n    weight: 1.0": "  regex: {pattern: '['}"}, "C304", "11:3", "not a regular expression"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_at_its_place(
    write: Write, change: dict[str, str], code: str, where: str, said: str
) -> None:
    text = RECIPE
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    path = write(text)
    found = problem(path)
    assert found.code == f"RLKD-{code}"
    assert said in str(found)
    assert found.where == (f"recipe.yaml:{where}" if where else "recipe.yaml")
    assert bool(found.excerpt) == bool(where)


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("learner.lr", "C008", "not of the form key=value"),
        ("=1", "C008", "not of the form key=value"),
        ("learner..lr=1", "C008", "not of the form key=value"),
        ("learner.lr=[1", "C005", "cannot be read as yaml"),
        ("learner.lr=fast", "C003", "`learner.lr` must be a number, not `fast`"),
        ("learner.lr.x=1", "C003", "`learner.lr` must be a number, not a section"),
        ("learner=1", "C003", "`learner` must be a section"),
        ("lr=1", "C002", "did you mean `learner.lr`?"),
        ("algorithm.name=dapoo", "C010", "did you mean `dapo`?"),
        ("seed=" + "1" * 5000, "C008", "too many digits"),
        ("seed=9223372036854775808", "C012", "seed=9223372036854775808: must be at least 0 and below"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(write: Write, override: str, code: str, said: str) -> None:
    found = problem(write(), override)
    assert found.code == f"RLKD-{code}"
    assert found.where == f"command line: {override}"
    assert said in str(found)


def test_switching_the_algorithm_over_anothers_settings(write: Write) -> None:
    write("algorithm: {name: dapo, overlong_max: 256, overlong_buffer: 64}", "base.yaml")
    path = write("defaults: [base]\n" + RECIPE)
    found = problems(path)
    assert [p.where for p in found] == ["base.yaml:1:25", "base.yaml:1:44"]
    assert all("the algorithm grpo has no such setting (it is one of dapo)" in p.what for p in found)
    assert load(path, ["algorithm.name=dapo"]).algorithm.overlong_buffer == 64


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recpe.yaml", None, "did you mean `recipe.yaml`?"),
        ("recipe", None, "did you mean `recipe.yaml`?"),
        ("folder", b"", "is a directory"),
        ("latin.yaml", "name: ä".encode("latin-1"), "is not UTF-8 text"),
        ("a\0b.yaml", None, "null byte"),
    ],
)
def test_a_recipe_that_cannot_be_read(write: Write, name: str, content: bytes | None, said: str) -> None:
    write()
    if name == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    found = problem(Path(name))
    assert found.code == "RLKD-C001"
    assert said in str(found)


def test_a_circle_of_defaults_is_named(write: Write) -> None:
    write("defaults: [b]", "a.yaml")
    write("x: 1\ndefaults:\n  - sub/../a", "b.yaml")
    found = problem(write("defaults: [a]\n" + RECIPE))
    assert found.where == "b.yaml:3:5"
    assert "a.yaml → b.yaml → a.yaml" in found.what


def test_the_same_defaults_twice_are_no_circle(write: Write) -> None:
    write("seed: 7", "a.yaml")
    write("defaults: [a]", "b.yaml")
    assert load(write("defaults: [a, b]\n" + RECIPE)).seed == 7


def test_aliases_cannot_explode(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    found = problem(write("\n".join(lines)))
    assert "over 5000 values" in found.what


@pytest.mark.parametrize("text", [f"{{a: {'[' * n}{']' * n}}}" for n in (40, 3000)] + ["{a: " * 3000])
def test_what_is_nested_too_deeply_is_refused(write: Write, text: str) -> None:
    assert "nested too deeply" in str(problem(write(text)))


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_what_came_from_the_environment_is_not_written(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "hf_TESTSECRET")
    options = (
        "{a: '${oc.env:CANARY}', b: ['x-${oc.env:CANARY}'], c: {d: '${data.train.options.a}'},"
        " api_key: sk-PLAIN, eos_token: </s>}"
    )
    path = write(RECIPE.replace("size: 1000", f"size: 1000, options: {options}"))
    config = load(path, ["report.wandb_project=${oc.env:CANARY}"])
    made = config.data.train.options
    assert (made["a"], made["b"], made["c"]["d"]) == ("hf_TESTSECRET", ["x-hf_TESTSECRET"], "hf_TESTSECRET")
    written = resolved(replace(config, name="another"))
    assert "TESTSECRET" not in written
    assert "sk-PLAIN" not in written
    assert "</s>" in written
    assert "TESTSECRET" not in repr(config.written)
    again = load(write(written, "again.yaml"))
    assert again.report == config.report
    assert (again.name, again.data.train.options["b"]) == ("another", ["x-hf_TESTSECRET"])


def test_a_wrong_secret_is_not_shown(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "hf_TESTSECRET")
    assert "TESTSECRET" not in str(problem(write(), "learner.lr=${oc.env:CANARY}"))


def test_resolved_is_a_recipe_of_the_same_config(write: Write) -> None:
    odd = "evaluate.k=[1]", "model.system='null'", "report.wandb=offline", "teachers.t.path='1e-3'", "name=off"
    config = load(write(), [*odd, "data.train.options={a: '1e-3', b: 'yes', c: 1e-3, d: '012'}"])
    assert load(write(resolved(config), "again.yaml")) == config


# -- contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.faults("F62")
@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["schedule.steps=0"], "schedule.steps", "schedule.steps=0: must be at least 1 … for example schedule.steps=1"),
        (["schedule.groups_per_step=0"], "schedule.groups_per_step", "at least 1"),
        (["schedule.staleness=-1"], "schedule.staleness", "at least 0"),
        (["algorithm.rollout.samples=1"], "algorithm.rollout.samples", "needs at least 2"),
        (["algorithm.dual_clip=1"], "algorithm.dual_clip", "algorithm.dual_clip=1.0 must be > 1"),
        (["algorithm.norm=constant"], "algorithm.norm", "needs norm_length"),
        (["algorithm.correction=mis", "algorithm.correction_low=3"], "algorithm.correction_low", "below"),
        (["algorithm.name=dapo", "algorithm.overlong_max=9", "algorithm.overlong_buffer=1"], "algorithm.overlong_max",
         "algorithm.overlong_max=9 is not sampler.max_tokens=256"),
        (["rewards.arithmetic.weight=0"], "rewards.arithmetic.weight", "every reward has weight 0"),
        (["rewards.arithmetic.weight=.nan"], "rewards.arithmetic.weight", "finite"),
        (["algorithm.beta=.inf"], "algorithm.beta", "algorithm.beta=inf"),
        (["rewards.overlong={max_tokens: 300}"], "rewards.overlong", "never reached"),
        (["data.train.size=3"], "data.train.size", "a prompt would stand twice in one step"),
        (["learner.ranks=17", "learner.zero_stage=1"], "learner.ranks", "17 is more than the 16 samples of a step"),
        (["learner.warmup_steps=10"], "learner.warmup_steps", "at most 9"),
        (["learner.max_tokens=256"], "learner.max_tokens", "a sample has at least 257 tokens: prompt 1 + answer 256"),
        (["learner.max_tokens=300", "data.max_prompt_tokens=100"], "learner.max_tokens",
         "up to 356 tokens: prompt 100 + answer 256 … learner.max_tokens=356, or shorten sampler.max_tokens"),
        (["algorithm.beta=0.1", "reference.max_tokens=99"], "reference.max_tokens", "at least 257 tokens"),
        (["teachers.t.max_tokens=99"], "teachers.t.max_tokens", "at least 257 tokens"),
        (["teachers.t.workers=0"], "teachers.t.workers", "at least 1"),
        (["teachers={a.b: {workers: 0}}"], "teachers", "teachers.a.b.workers=0"),
        (["model.context=256"], "model.context", "leaves no room for a prompt in a context of 256"),
        (["model.context=300", "data.max_prompt_tokens=100"], "data.max_prompt_tokens",
         "make 356 tokens; the context has 300 … data.max_prompt_tokens=44, or sampler.max_tokens=200"),
        (["sampler.min_tokens=300"], "sampler.min_tokens", "is more than sampler.max_tokens=256"),
        (["sampler.temperature=0"], "sampler.temperature", "must be above 0"),
        (["sampler.top_p=0"], "sampler.top_p", "above 0 and at most 1"),
        (["sampler.top_p=0.9"], "sampler.top_p", "the learner computes log-probabilities of that one"),
        (["sampler.engine=hf", "sampler.tensor_parallel=2"], "sampler.tensor_parallel", "not of hf"),
        (["model.device=cpu", "model.attention=flash"], "model.attention", "needs a GPU"),
        (["model.device=cpu", "learner.offload=true", "learner.zero_stage=2"], "learner.offload", "host memory"),
        (["model.path="], "model.path", "is empty"),
        (["learner.zero_stage=2"], "learner.zero_stage", "shards over ranks, and learner.ranks=1"),
        (["learner.offload=true"], "learner.offload", "it is 0 on one rank by default"),
        (["learner.lr=0"], "learner.lr", "above 0"),
        (["learner.lr=.inf"], "learner.lr", "above 0"),
        (["learner.betas=[0.9, 1]"], "learner.betas", "learner.betas=1.0: must be at least 0 and below 1"),
        (
            ["curriculum.name=difficulty", "curriculum.low=0.9", "curriculum.high=0.1"],
            "curriculum.low",
            "every prompt would be outside",
        ),
        (["curriculum.low=0.2"], "curriculum.low", "is of the curriculum difficulty"),
        (["curriculum.high=2"], "curriculum.high", "at most 1"),
        (["sync.path=/shared"], "sync.path", "used by sync.kind=disk only"),
        (["data.train.kind=jsonl"], "data.train.kind", "data.train.path is missing for kind jsonl"),
        (["data.train.size=null"], "data.train.size", "needs to know how many prompts"),
        (["data.train.split=test"], "data.train.split", "the splits train and holdout"),
        (["data.train.answer=prompt"], "data.train.answer", "the same column"),
        (["data.holdout.split=train"], "data.holdout.split", "data.holdout is data.train"),
        (["data.chat=false", "model.system=x"], "model.system", "not used when data.chat=false"),
        (["data.holdout=null"], "data.holdout", "evaluate.at_start=false evaluate.at_end=false"),
        (["evaluate.samples=4"], "evaluate.samples", "would be the same answer each time"),
        (["evaluate.k=[1, 8]"], "evaluate.k", "pass@8 cannot be estimated from evaluate.samples=1"),
        (["evaluate.k=[]"], "evaluate.k", "is empty"),
        (["name=../../x"], "name", "cannot be the name of a run"),
        (["name=" + "x" * 101], "name", "100 at most"),
        (["name=-x"], "name", "a letter or digit first"),
        (["teachers={a/b: {}}"], "teachers", "cannot be the name of a teacher"),
        (["report.directory="], "report.directory", "is empty"),
        (["ray.object_store_gib=0.01"], "ray.object_store_gib", "at least 0.1"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_what_would_fit(
    write: Write, overrides: list[str], key: str, said: str
) -> None:
    found = problem(write(), *overrides)
    assert found.code in ("RLKD-C011", "RLKD-C012")
    assert found.fix
    assert all(part in str(found) for part in said.split(" … "))
    assert found.where is not None
    assert found.where.startswith(f"command line: {key.partition('.')[0]}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.holdout=null", "evaluate.at_start=false", "evaluate.at_end=false"],
        ["evaluate.samples=8", "evaluate.temperature=1", "evaluate.k=[1, 8]"],
        ["learner.ranks=2", "learner.zero_stage=2"],
        ["learner.offload=true", "learner.zero_stage=2"],
        ["algorithm.name=dapo", "algorithm.overlong_max=${sampler.max_tokens}", "algorithm.overlong_buffer=64"],
        ["learner.max_tokens=356", "data.max_prompt_tokens=100", "model.context=356"],
        ["sampler.top_p=1", "evaluate.top_p=0.5"],
        ["sync.kind=disk", "sync.path=/shared"],
        ["curriculum.name=difficulty", "curriculum.low=0.1", "curriculum.high=0.1"],
    ],
)
def test_what_fits_is_not_refused(write: Write, overrides: list[str]) -> None:
    assert isinstance(load(write(), overrides), Config)


def test_the_model_and_the_data_say_more(write: Write) -> None:
    config = load(write(), ["model.context=512", "sampler.max_tokens=300", "learner.max_tokens=400"])
    check(config, model_context=512, longest_prompt=100)
    with pytest.raises(ConfigError) as caught:
        check(config, model_context=256, longest_prompt=200)
    first, second = caught.value.problems
    assert "model.context=512 is more than the 256 tokens" in first.what
    assert "learner.max_tokens=400, but a sample has up to 500 tokens: prompt 200 + answer 300" in second.what
    assert second.where == "command line: learner.max_tokens=400"


def test_an_algorithm_that_compares_samples_needs_its_group_in_one_micro_batch(write: Write) -> None:
    config = load(write(), ["learner.max_tokens=1000", "data.max_prompt_tokens=50"])

    class Whole(type(config.algorithm)):  # type: ignore[misc]
        whole_groups = True

    (found,) = findings(replace(config, algorithm=Whole(rollout=config.algorithm.rollout)))
    assert "a group of 4 samples has up to 1074 tokens: prompt 50 + answer 256 × 4" in found.what


@pytest.mark.faults("F62")
def test_every_number_has_a_range() -> None:
    """A new setting without a range is found here; numbers of algorithms and rewards are checked by themselves."""

    def numbers(cls: type[Any], at: str) -> set[str]:
        found = set()
        for name, hint in kinds.settings(cls).items():
            inner, _ = kinds.without_none(hint)
            section = kinds.section_of(hint)
            if section is not None:
                found |= numbers(section, f"{at}{name}.")
            elif inner in (int, float) or inner in (tuple[int, ...], tuple[float, float]):
                found.add(f"{at}{name}")
        return found

    assert numbers(Config, "") == set(RANGES)
    assert numbers(TeacherConfig, "") == set(TEACHER)


# -- any mistake -------------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("RLKD_FUZZ", "12"))  # inputs of the slow properties
GARBAGE = int(os.environ.get("RLKD_FUZZ", "150"))  # texts that are no recipe
LETTERS = st.sampled_from("abcdefghijklmnopqrstuvwxyz_")


def leaves(section: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys of a recipe whose names are ours: not of a generator's options."""
    found = []
    for key, value in section.items():
        found.append((*at, key))
        if isinstance(value, dict) and key != "options":
            found += leaves(value, (*at, key))
    return found


FULL = yaml.safe_load(RECIPE)


@pytest.fixture(scope="module")
def full_recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that gives every key of the schema."""
    path = tmp_path_factory.mktemp("full") / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    whole: dict[str, Any] = yaml.safe_load(resolved(load(path)))
    whole["rewards"] |= {"exact": {"weight": 0.5, "where": "all"}}
    return whole


@st.composite
def edited(draw: st.DrawFn, word: str) -> str:
    """`word` with a letter inserted, left out or changed."""
    kind = draw(st.sampled_from(["insert", "delete", "change"]))
    at = draw(st.integers(0, len(word) - (kind != "insert")))
    if kind == "insert":
        return word[:at] + draw(LETTERS) + word[at:]
    return word[:at] + ("" if kind == "delete" else draw(LETTERS)) + word[at + 1 :]


@pytest.mark.faults("F61")
@settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_wrong_letter_in_any_key_is_caught_and_understood(
    full_recipe: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    *above, key = data.draw(st.sampled_from(leaves(full_recipe)), label="key")
    wrong = data.draw(edited(key), label="edited")
    recipe = copy.deepcopy(full_recipe)
    section = recipe
    for name in above:
        section = section[name]
    assume(wrong not in ("", *section))
    section[wrong] = section.pop(key)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "recipe.yaml")
    meant = [p for p in caught.value.problems if wrong in p.what and p.where]
    assert meant, str(caught.value)
    suggestion = f"{meant[0].what} {meant[0].fix}"
    assert f"`{key}`" in suggestion or f"'{key}'" in suggestion, str(meant[0])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.text(max_size=6) | st.sampled_from([*FULL])
JUNK = st.recursive(
    SCALARS | st.sampled_from(["${seed}", "${", "???"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=GARBAGE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.binary(max_size=40) | JUNK.map(yaml.safe_dump), override=st.text(max_size=20))
def test_garbage_is_a_config_error(tmp_path: Path, text: str | bytes, override: str) -> None:
    path = tmp_path / "garbage.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    with pytest.raises(ConfigError):  # nothing of it is a whole recipe
        load(path, [override])


@settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_junk_anywhere_in_a_recipe_is_a_config_error_or_fits(
    full_recipe: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    *above, key = data.draw(st.sampled_from(leaves(full_recipe)), label="key")
    recipe = copy.deepcopy(full_recipe)
    section = recipe
    for name in above:
        section = section[name]
    section[key] = data.draw(JUNK, label="value")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    try:
        config = load(tmp_path / "recipe.yaml")
    except ConfigError as e:
        lost = [p for p in e.problems if not p.where]
        assert not lost, lost
    else:
        assert resolved(config)


def test_similar() -> None:
    assert one_edit_apart("lr", "l")
    assert one_edit_apart("lr", "rl")
    assert not one_edit_apart("lr", "lr")
    assert not one_edit_apart("abc", "cba")
    assert similar("mix_tokens", ["max_tokens", "min_tokens", "lr"]) == ["max_tokens", "min_tokens"]
    assert similar("zzz", ["lr"]) == []
