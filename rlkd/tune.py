"""For Ray Tune users: a recipe as a trainable.

    from ray import tune
    import rlkd.tune

    tuner = tune.Tuner(
        rlkd.tune.trainable("configs/grpo-tiny.yaml", ["evaluate.every=10"]),
        param_space={"learner.lr": tune.loguniform(1e-5, 1e-3), "algorithm.rollout.samples": tune.choice([4, 8])},
        tune_config=tune.TuneConfig(metric="eval/pass@1", mode="max", num_samples=8),
        run_config=tune.RunConfig(name="lr", failure_config=tune.FailureConfig(max_failures=3)),
    )
    tuner.fit()

Keys are the recipe's, with dots. Each held-out evaluation is a result with `step` (use it as `time_attr`) and the
numbers `eval/…`. `rlkd sweep` is this with typed spaces, checks before the start, and a report.
"""

import os
from collections.abc import Mapping, Sequence
from os import PathLike

from rlkd.config.stages import load
from rlkd.sweep.spec import Spec
from rlkd.sweep.trial import Plan, Trial


def trainable(
    recipe: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    runs: str | PathLike[str] | None = None,
    at_once: int | None = None,
    metric: str = "eval/pass@1",
    pbt: bool = False,
    specs: Mapping[str, Spec] | None = None,
) -> type[Trial]:
    """A class for `tune.Tuner`, with the placement group of its trials. ConfigError if the recipe is wrong.

    `overrides` are for all trials, as on the command line. `runs`: where the trials' run folders go (None: `runs` in
    Tune's folder of the experiment; with a remote storage_path `runs/NAME/runs` here). `at_once`: how many trials share
    the machine, on CPUs (None: one). `metric`: what a trial reports as NaN when it fails before its first evaluation.
    `pbt`: save with every evaluation, so that trials can copy each other. `specs`: bounds that values are kept within.
    """
    path = os.path.abspath(recipe)
    load(path, overrides)
    own = None if runs is None else os.path.abspath(runs)
    plan = Plan(path, tuple(overrides), os.getcwd(), own, dict(specs or {}), at_once, metric, pbt)
    return type("rlkd_trial", (Trial,), {"plan": plan, "__doc__": f"A trial of {path}."})
