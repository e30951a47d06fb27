"""What the user says of the platform, beside the recipe; and what is wrong with it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from rlkd.core.errors import ConfigError, nearest
from rlkd.render import PLATFORMS

KEY = re.compile(r"([A-Za-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")  # of a Kubernetes label or taint
VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # a Kubernetes object's name
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+")  # as sbatch reads it
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


@dataclass(frozen=True)
class Toleration:
    """Of a taint on preemptible nodes. `value=None`: whatever it is."""

    key: str
    value: str | None
    effect: str


@dataclass(frozen=True)
class Settings:
    """Checked when made: ConfigError RLKD-C443 names the option."""

    image: str
    shared: str | None = None  # a folder that every node sees, in which the run starts
    claim: str | None = None  # kuberay: the volume claim that is mounted there
    secret: str | None = None  # kuberay: a secret with environment variables
    stable: Mapping[str, str] = field(default_factory=dict)  # node selectors
    preemptible: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    notice_s: int = 30  # what preemptible nodes get before they are taken away
    retries: int = 20  # of a run that ended with 75
    time: str = "24:00:00"  # slurm
    sbatch: tuple[str, ...] = ()  # slurm: more options
    wait_s: int = 1800  # for nodes that are not there yet

    def __post_init__(self) -> None:
        texts = {"--image": self.image, "--shared": self.shared, "--time": self.time}
        for name, text in [*texts.items(), *(("--sbatch", s) for s in self.sbatch)]:
            if text is not None and not text.isprintable():
                raise _wrong(name, text, "one line of text")
        if not IMAGE.fullmatch(self.image):
            raise _wrong("--image", self.image, "the name of an image, for example registry/rlkd:0.1")
        for name, value in (("--claim", self.claim), ("--secret", self.secret)):
            if value is not None and not OBJECT.fullmatch(value):
                raise _wrong(name, value, "the name of a Kubernetes object: small letters, digits, `-`")
        if self.shared is not None and (not self.shared.startswith("/") or ".." in PurePosixPath(self.shared).parts):
            raise _wrong("--shared", self.shared, "an absolute path, the same on every node")
        if not TIME.fullmatch(self.time):
            raise _wrong("--time", self.time, "as sbatch reads it: 24:00:00, or 3-00:00:00")
        for extra in self.sbatch:
            if not extra.startswith("-"):
                raise _wrong("--sbatch", extra, "an option of sbatch, for example --partition=gpu")
        for name, number, least in (("--notice", self.notice_s, 10), ("--retries", self.retries, 0)):
            if number < least:
                raise _wrong(name, str(number), f"at least {least}")


def platform(name: str) -> str:
    """ConfigError RLKD-C440 for one that is not known."""
    if name in PLATFORMS:
        return name
    near = nearest(name.lower(), PLATFORMS) or {"k8s": "kuberay", "kubernetes": "kuberay", "ray": "ray-up"}.get(name)
    fix = f"did you mean `{near}`?  " if near else ""
    raise ConfigError("RLKD-C440", f"--for {name}: no such platform", "command line", f"{fix}{', '.join(PLATFORMS)}")


def labels(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Node selectors from `key=value` texts."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not KEY.fullmatch(key) or not VALUE.fullmatch(value):
            raise _wrong(name, text, "KEY=VALUE, a label of the nodes")
        found[key] = value
    return found


def tolerations(texts: Sequence[str]) -> tuple[Toleration, ...]:
    """From `key=value:Effect` or `key:Effect` texts, as `kubectl taint` writes them."""
    found = []
    for text in texts:
        what, colon, effect = text.rpartition(":")
        key, equals, value = what.partition("=")
        if not colon or effect not in EFFECTS or not KEY.fullmatch(key) or not VALUE.fullmatch(value):
            raise _wrong("--toleration", text, f"KEY[=VALUE]:EFFECT, the effect one of {', '.join(EFFECTS)}")
        found.append(Toleration(key, value if equals else None, effect))
    return tuple(found)


def _wrong(name: str, value: str, wanted: str) -> ConfigError:
    return ConfigError("RLKD-C443", f"{name} {value!r}", where="command line", fix=wanted)
