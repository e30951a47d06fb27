"""Recipes with stages: what each stage's config is, and every mistake with its place."""

from pathlib import Path

import pytest

from rlkd import staged
from rlkd.config.load import resolved
from rlkd.config.stages import load
from rlkd.core.errors import ConfigError, PreflightError

SHARED = """
model: {path: models/tiny}
data: {train: {kind: arithmetic, size: 8}}
algorithm: {name: dapo, overlong_max: 32, overlong_buffer: 8}
rewards: {arithmetic: {}}
schedule: {steps: 5, groups_per_step: 4}
sampler: {max_tokens: 32}
evaluate: {at_start: false, at_end: false}
"""
STAGES = """
stages:
  - name: warm
    algorithm: {name: grpo}
    schedule: {steps: 2}
  - name: rl
    learner: {lr: 1e-5}
    rewards: {length: {tokens: 20}}
"""


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def problems(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return "\n".join(str(p) for p in error.value.problems)


def test_what_a_stage_says_is_over_what_all_share(tmp_path: Path) -> None:
    warm, rl = load(recipe(tmp_path, SHARED + STAGES))
    assert (warm.name, rl.name) == ("warm", "rl")
    assert (warm.config.schedule.steps, rl.config.schedule.steps) == (2, 5)
    assert (warm.config.schedule.groups_per_step, rl.config.schedule.groups_per_step) == (4, 4)
    assert (warm.config.algorithm.name, rl.config.algorithm.name) == ("grpo", "dapo")  # and none of dapo's options
    assert rl.config.algorithm.overlong_max == 32
    assert (list(warm.config.rewards), list(rl.config.rewards)) == (["arithmetic"], ["length"])


def test_overrides_of_all_stages_and_of_one(tmp_path: Path) -> None:
    path = recipe(tmp_path, SHARED + STAGES)
    warm, rl = load(path, ["schedule.groups_per_step=2", "stages.rl.schedule.steps=9", "learner.lr=3e-4"])
    assert (warm.config.schedule.groups_per_step, rl.config.schedule.groups_per_step) == (2, 2)
    assert (warm.config.schedule.steps, rl.config.schedule.steps) == (2, 9)
    assert (warm.config.learner.lr, rl.config.learner.lr) == (3e-4, 3e-4)


def test_a_recipe_without_stages_is_one(tmp_path: Path) -> None:
    [only] = load(recipe(tmp_path, SHARED), ["schedule.steps=7"])
    assert (only.name, only.config.schedule.steps) == ("", 7)


@pytest.mark.parametrize(
    ("stages", "overrides", "said"),
    [
        ("stages: 3", [], "`stages` must be a list of stages, not `3`"),
        ("stages: []", [], "`stages` must be a list of stages, not an empty list"),
        ("stages: [{learner: {lr: 1}}]", [], "stage 1 has no name"),
        ("stages: [{name: a/b}]", [], "stage 1 cannot be called 'a/b'"),
        ("stages: [{name: a}, {name: a}]", [], "two stages are called `a`"),
        ("stages: [{name: a}, {name: b, model: {path: x}}]", [], "stage `b` says model.path"),
        ("stages: [{name: warm}]", ["stages.worm.learner.lr=1"], "did you mean `warm`?"),
        ("stages: [{name: warm}]", ["stages=3"], "`stages` cannot be given on the command line"),
        ("", ["stages.rl.learner.lr=1"], "none: it has no `stages`"),
        ("stages: [{name: a, lerner: {}}]", [], "did you mean `learner`?"),
        ("stages: [{name: a}, {name: b, schedule: {steps: -1}}]", [], "schedule.steps=-1"),
    ],
)
def test_mistakes(tmp_path: Path, stages: str, overrides: list[str], said: str) -> None:
    assert said in problems(recipe(tmp_path, SHARED + stages), *overrides)


def test_a_later_stage_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    text = SHARED.replace("models/tiny", "'${oc.env:HOME}/x'")
    _, rl = load(recipe(tmp_path, text + STAGES))
    config = staged.placed(rl.config, tmp_path / "demo", "2-rl", tmp_path / "demo/1-warm/checkpoints/step-000002/hf")
    assert config.model.path.endswith("1-warm/checkpoints/step-000002/hf")
    assert "1-warm/checkpoints/step-000002/hf" in resolved(config)  # not the expression of the first one's
    assert Path(config.report.directory) / config.name == tmp_path / "demo/2-rl"


def test_another_recipes_folder_is_refused(tmp_path: Path) -> None:
    staged._open(tmp_path / "demo", ["1-warm", "2-rl"])
    staged._open(tmp_path / "demo", ["1-warm", "2-rl"])
    with pytest.raises(PreflightError, match="this run has the stages 1-warm, 2-rl, and the recipe 1-sft"):
        staged._open(tmp_path / "demo", ["1-sft"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(PreflightError, match="has other things in it"):
        staged._open(tmp_path / "other", ["1-warm"])


def test_a_runs_folder_is_that_of_its_last_stage_begun(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    staged._open(root, ["1-warm", "2-rl"])
    assert staged.run_folder(root) == root / "1-warm"
    for name in ("1-warm", "2-rl"):
        done = root / name / "checkpoints/step-000002/MANIFEST.json"
        done.parent.mkdir(parents=True)
        done.touch()
        assert staged.run_folder(root) == root / name
    assert staged.run_folder(tmp_path) == tmp_path
