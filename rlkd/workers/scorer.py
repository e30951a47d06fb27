"""A scorer on Ray: the actor is that of the rollout workers, the engine inside writes nothing and only scores."""

from collections.abc import Callable, Mapping
from typing import Any

from rlkd.workers import rollout

ENGINE = "rlkd.engines.scorer:Scorer"


def spawner(
    options: Mapping[str, Any], environment: Mapping[str, str], actor: Callable[[int], Mapping[str, Any]]
) -> Callable[[int], Any]:
    """What a Pool makes its scorers with: index -> actor handle. `options` are those of ScorerOptions."""
    return rollout.spawner(ENGINE, options, environment, actor)
