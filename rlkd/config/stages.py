"""A recipe with `stages`: one run after the other, each on the model that the one before it left.

    model: …                       # what all stages share
    stages:
      - name: sft                  # a folder of the run; then whatever differs
        algorithm: {name: sft}
        schedule: {steps: 50}
      - name: rl
        algorithm: {name: grpo}

A stage's `rewards`, and its `algorithm` where it says a name, take the place of the recipe's; everything else is merged
key by key. Overrides of the command line are on top of every stage, `stages.rl.schedule.steps=10` of that one alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from rlkd.config import recipe
from rlkd.config.contradictions import NAME
from rlkd.config.load import made
from rlkd.config.places import Entry, Found, did_you_mean, similar
from rlkd.config.recipe import Section, merged
from rlkd.config.schema import Config

KEY = "stages"


@dataclass(frozen=True)
class Stage:
    """One of a recipe's runs. The only one of a recipe without stages has no name."""

    name: str
    config: Config


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> list[Stage]:
    """The recipe's stages, in order. ConfigError with all problems of all of them."""
    found = Found()
    base, above = recipe.parts(str(path), overrides, found)
    stages = _stages(base.pop(KEY, None), found)
    found.stop_if_any()
    shared, own = _split(above, stages, found)
    found.stop_if_any()
    made_of = {}
    for name, stage in stages.items():
        section = _over(base, stage)
        for one in (*shared, *own.get(name, ())):
            section = merged(section, one)
        made_of[name] = made(section, str(path), overrides, found)
    found.stop_if_any()
    return [Stage(name, config) for name, config in made_of.items() if config is not None]


def _stages(entry: Entry | None, found: Found) -> dict[str, Section]:
    """The sections of the stages by name, without it."""
    if entry is None:
        return {"": {}}
    if not isinstance(entry.value, list) or not entry.value:
        fix = "a list of stages, each with a name and what differs: `- name: sft`"
        found.add("RLKD-C003", f"`{KEY}` must be a list of stages, not {entry.shown()}", entry.place, fix)
        return {}
    stages: dict[str, Section] = {}
    for number, item in enumerate(entry.value):
        section = dict(item.value) if isinstance(item.value, dict) else {}
        name = section.pop("name", None)
        called = "" if name is None else str(name.value)
        if not NAME.fullmatch(called):
            place, what = (item.place, "has no name") if name is None else (name.place, f"cannot be called {called!r}")
            fix = "`name:` letters, digits, `.`, `_` and `-`: it becomes a folder of the run"
            found.add("RLKD-C004", f"stage {number + 1} {what}", place, fix)
        elif called in stages:
            found.add("RLKD-C006", f"two stages are called `{called}`", item.place, "give each a name of its own")
        elif number and (start := _start(section)) is not None:
            fix = "leave it out: a stage goes on with the model of the one before it"
            found.add("RLKD-C011", f"stage `{called}` says model.path", start.place, fix)
        stages[called] = section
    return stages


def _start(section: Section) -> Entry | None:
    model = section.get("model")
    return model.value.get("path") if model is not None and isinstance(model.value, dict) else None


def _split(
    above: Sequence[Section], stages: dict[str, Section], found: Found
) -> tuple[list[Section], dict[str, list[Section]]]:
    """Overrides of all stages, and those of single ones (`stages.NAME.key=value`)."""
    shared: list[Section] = []
    own: dict[str, list[Section]] = {}
    for section in above:
        entry = section.get(KEY)
        if entry is None:
            shared.append(section)
            continue
        named = entry.value if isinstance(entry.value, dict) else {}
        for name, inner in named.items():
            if name in stages and name and isinstance(inner.value, dict):
                own.setdefault(name, []).append(inner.value)
                continue
            close = similar(name, list(stages))
            known = ", ".join(n for n in stages if n) or "none: it has no `stages`"
            fix = did_you_mean(close) if close else f"stages of this recipe: {known}"
            found.add("RLKD-C008", f"there is no stage `{name}`", inner.place, fix)
        if not named:
            fix = f"for example {KEY}.sft.learner.lr=1e-5"
            found.add("RLKD-C008", f"`{KEY}` cannot be given on the command line", entry.place, fix)
    return shared, own


def _over(base: Section, stage: Section) -> Section:
    """A stage over what all share."""
    below = dict(base)
    chosen = stage.get("algorithm")
    if chosen is not None and isinstance(chosen.value, dict) and "name" in chosen.value:
        below.pop("algorithm", None)
    if "rewards" in stage:
        below.pop("rewards", None)
    return merged(below, stage)
