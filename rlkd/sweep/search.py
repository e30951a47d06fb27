"""A space and its settings in the words of Ray Tune."""

import importlib.util
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from rlkd.core.errors import PreflightError
from rlkd.sweep.settings import Settings
from rlkd.sweep.space import Space
from rlkd.sweep.spec import Spec

TIME = "step"  # by what schedulers count: optimizer steps, which every result has
DOMAINS: Mapping[str, Callable[..., Any]] = {
    "uniform": tune.uniform,
    "quniform": tune.quniform,
    "loguniform": tune.loguniform,
    "qloguniform": tune.qloguniform,
    "randint": tune.randint,
    "lograndint": tune.lograndint,
    "qrandint": tune.qrandint,
    "normal": tune.randn,
}


def parameters(space: Space) -> dict[str, Any]:
    """Tune's `param_space`."""
    return {key: _domain(spec, space.settings.search == "grid") for key, spec in space.specs.items()}


def algorithm(space: Space) -> Any:
    """What draws the trials. PreflightError RLKD-E621 if it is not installed."""
    settings = space.settings
    if settings.search != "optuna":
        return BasicVariantGenerator(max_concurrent=settings.at_once or 0, random_state=settings.seed)
    if importlib.util.find_spec("optuna") is None:
        raise PreflightError(
            "RLKD-E621",
            "sweep.search=optuna, and optuna is not installed",
            where=space.place("sweep.search").where,
            fix="install rlkd[optuna] (or optuna itself), or sweep.search: random",
        )
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    found = OptunaSearch(seed=settings.seed)  # metric and mode come with TuneConfig
    return ConcurrencyLimiter(found, max_concurrent=settings.at_once) if settings.at_once else found


class Asha(AsyncHyperBandScheduler):
    """Ray's, which after a restore has forgotten what the trials reported before: `past(trial)` says it again, the
    metric by step."""

    def __init__(self, past: Callable[[Any], Mapping[int, float]], **options: Any) -> None:
        super().__init__(**options)
        self._past = past

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        assert self._metric_op is not None  # Tune said max or min
        for step, value in sorted(self._past(trial).items()):
            self._trial_info[trial.trial_id].on_result(trial, step, self._metric_op * value)


def scheduler(space: Space, every: int, steps: int, past: Callable[[Any], Mapping[int, float]]) -> TrialScheduler:
    """Who stops or copies trials. `every`: steps between two evaluations, `steps`: of the longest trial."""
    s = space.settings
    random.seed(s.seed)  # PBT draws from here
    if s.scheduler == "asha":
        grace = min(s.grace or every, steps)
        return Asha(past, time_attr=TIME, grace_period=grace, reduction_factor=s.reduction, max_t=steps)
    if s.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=s.perturb or every,
            burn_in_period=s.grace or 0,
            hyperparam_mutations={key: _mutation(spec) for key, spec in space.specs.items()},
            quantile_fraction=s.quantile,
            custom_explore_fn=partial(inside, space.specs),
            log_config=False,
        )
    return FIFOScheduler()


def inside(specs: Mapping[str, Spec], config: dict[str, Any]) -> dict[str, Any]:
    """A config whose numbers were multiplied, back within what the space says."""
    return {key: specs[key].nearest(value) if key in specs else value for key, value in config.items()}


def ways(settings: Settings) -> str:
    """Search and scheduler in words."""
    return settings.search if settings.scheduler == "none" else f"{settings.search}, {settings.scheduler}"


def _domain(spec: Spec, grid: bool) -> Any:
    if spec.kind in ("choice", "grid"):
        return tune.grid_search(list(spec.values)) if grid else tune.choice(list(spec.values))
    return DOMAINS[spec.kind](*spec.values)


def _mutation(spec: Spec) -> Any:
    """A list is walked along, a distribution is drawn from or multiplied."""
    return list(spec.values) if spec.kind == "choice" else _domain(spec, grid=False)
