"""The file of `--space`: dotted keys of the recipe with a distribution each, and the section `sweep`.

sweep: {trials: 8, scheduler: asha}
learner.lr: {loguniform: [1.0e-5, 1.0e-3]}
algorithm.rollout.samples: {choice: [4, 8]}

RLKD-C601 a key that may not differ between trials · C602 distribution · C603 sweep.… · C604 what does not go
together · C605 nothing to search; what a value does to the recipe has the recipe's own codes
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlkd.config.places import Entry, Found, Place, did_you_mean, similar
from rlkd.config.recipe import Document
from rlkd.sweep import settings as sweep_settings
from rlkd.sweep.settings import Settings
from rlkd.sweep.spec import KINDS, Spec

OWN: Mapping[str, str] = {
    "name": "each trial gets its own",
    "report": "the sweep says where a trial's folder is",
    "ray": "all trials share one cluster",
    "evaluate": "trials are compared by it",
    "data.holdout": "trials are compared on it",
    "stages": "give a key of all stages, without `stages.NAME.`",
    "defaults": "it names files",
}


@dataclass(frozen=True)
class Space:
    """What is searched, and how. `places`: of each key; of `sweep.…` too."""

    path: str
    settings: Settings
    specs: Mapping[str, Spec]
    places: Mapping[str, Place] = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """How many there will be."""
        times = self.settings.trials
        if self.settings.search != "grid":
            return 8 if times is None else times
        points = 1
        for spec in self.specs.values():
            points *= len(spec.values)
        return points * (times or 1)

    def place(self, key: str) -> Place:
        """Where a key, or a setting of the sweep, was written; the file if it was not."""
        return self.places.get(key, Place(self.path))


def read(path: str, found: Found) -> Space:
    """What the file says; problems go to `found`. What has one is left out."""
    top = Place(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        found.add("RLKD-C001", f"cannot read the space file {path!r}: {reason.lower()}", top, "--space FILE")
        return Space(path, Settings(), {})
    section = Document(path, text, 0, found).section()
    settings, places = sweep_settings.read(section.pop(sweep_settings.KEY, None), found)
    places = {f"{sweep_settings.KEY}.{name}": place for name, place in places.items()}
    specs = {}
    for key, entry in section.items():
        places[key] = entry.place
        if (spec := _spec(key, entry, found)) is not None:
            specs[key] = spec
    if not section and not found.codes():
        fix = "for example `learner.lr: {loguniform: [1.0e-6, 1.0e-4]}`"
        found.add("RLKD-C605", "the space is empty: there is no key to search over", top, fix)
    return Space(path, settings, specs, places)


def _spec(key: str, entry: Entry, found: Found) -> Spec | None:
    """The distribution of one key; None if it has a problem."""
    if (own := owner(key)) is not None:
        found.add("RLKD-C601", f"`{key}` cannot differ between trials: {OWN[own]}", entry.place, "leave it out")
        return None
    how = f"`{key}: {{choice: [a, b]}}`; one of {', '.join(KINDS)}"
    if not isinstance(entry.value, dict) or len(entry.value) != 1:
        found.add("RLKD-C602", f"`{key}` must be one distribution, not {_shown(entry)}", entry.place, how)
        return None
    ((kind, arguments),) = entry.value.items()
    if kind not in KINDS:
        fix = did_you_mean(similar(kind, KINDS)) or how
        found.add("RLKD-C602", f"`{key}`: there is no distribution `{kind}`", arguments.place, fix)
        return None
    values = arguments.plain()
    if not isinstance(values, list):
        found.add("RLKD-C602", f"`{key}`: `{kind}` takes a list, not {arguments.shown()}", arguments.place, how)
        return None
    spec = Spec(kind, tuple(values))
    if (problem := spec.problem()) is not None:
        found.add("RLKD-C602", f"`{key}`: {problem}", arguments.place)
        return None
    return spec


def owner(key: str) -> str | None:
    """The entry of OWN that this key belongs to."""
    return next((own for own in OWN if key == own or key.startswith(f"{own}.")), None)


def _shown(entry: Entry) -> str:
    return f"{len(entry.value)} of them" if isinstance(entry.value, dict) else entry.shown()
