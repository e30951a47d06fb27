"""What runs on a platform: the command, where it starts, how much notice it needs. And whether it can run there."""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from rlkd.config.schema import Config, RayConfig
from rlkd.core.errors import ConfigError
from rlkd.render.settings import Settings

LONGEST = 47  # characters of a RayJob's name: KubeRay puts more behind it
SPARE_S = 30  # beside the drain of a node: for Ray to end its processes


@dataclass(frozen=True)
class Job:
    name: str  # the run's
    recipe: str
    overrides: tuple[str, ...]
    directory: str | None  # in which it starts, the same on every node; None: the image's
    grace_s: int  # between SIGTERM and the kill: rlkd.plan.saving.grace
    gpu: bool
    ray_version: str
    rendered_by: str  # the command, for the files' first lines
    on_nodes: tuple[str, ...] = ()  # overrides for `rlkd submit`, which would take the paths of where it is called

    @property
    def command(self) -> str:
        """The shell command of the run."""
        return shlex.join(["rlkd", "train", self.recipe, *self.overrides])

    def submit(self, address: str) -> str:
        """The same run on a cluster that is there, from anywhere."""
        return shlex.join(["rlkd", "submit", self.recipe, *self.overrides, *self.on_nodes, "--ray", address])

    @property
    def label(self) -> str:
        """The name as Kubernetes wants it: small letters, digits and `-`, a letter first."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
        if len(plain) <= LONGEST:
            return plain
        return f"{plain[: LONGEST - 7].rstrip('-')}-{hashlib.blake2b(self.name.encode(), digest_size=3).hexdigest()}"


def added(config: Config, platform: str, grace_s: int, wait_s: int, gpu: bool) -> list[str]:
    """Settings that the platform needs and the recipe does not say."""
    more = ["model.device=cuda"] if gpu and config.model.device == "auto" else []  # `auto` takes what is there at first
    if platform in ("slurm", "docker") and config.preempt.grace_s is None:
        more.append(f"preempt.grace_s={grace_s}")  # Ray jobs are told by RAY_JOB_STOP_WAIT_TIME_S
    if platform != "docker" and config.ray.wait_s == RayConfig().wait_s:
        more.append(f"ray.wait_s={wait_s}")  # nodes come one after the other
    return more


def on_nodes(paths: Mapping[str, str], shared: str | None) -> list[str]:
    """What the recipe names relative to the shared folder, by its name on the nodes."""
    relative = {key: path for key, path in paths.items() if not path.startswith(("/", "~"))}
    return [] if shared is None else [f"{key}={PurePosixPath(shared) / path}" for key, path in relative.items()]


def check_storage(configs: Sequence[Config], platform: str, settings: Settings, learner_apart: bool) -> None:
    """ConfigError RLKD-C441 if checkpoints would be on one node's own disk, and be gone with it.

    `learner_apart`: learner ranks are on other nodes than the driver; then a remote copy does not help, for the parts
    of a checkpoint must come together in one folder first.
    """
    for config in configs:
        directory, remote, shared = config.report.directory, config.checkpoint.remote, settings.shared
        if platform == "docker":
            inside = not PurePosixPath(directory).is_absolute()
            if not inside and remote is None:
                _refuse(f"report.directory={directory} is inside the container, and gone with it",
                        "a path relative to where the container starts, or set checkpoint.remote=s3://…")  # fmt: skip
            continue
        if platform == "kuberay" and shared is not None and settings.claim is None:
            what = f"--shared {shared} needs the volume claim that is mounted there"
            raise ConfigError("RLKD-C443", what, where="command line", fix="--claim NAME, a ReadWriteMany claim")
        inside = shared is not None and _inside(directory, shared)
        if inside or (remote is not None and not learner_apart):
            continue
        if shared is not None:
            _refuse(f"report.directory={directory} is not in {shared}, the folder that all nodes see",
                    f"report.directory={shared.rstrip('/')}/runs, or a relative path")  # fmt: skip
        if remote is not None:
            _refuse(f"report.directory={directory} is on each node's own disk, and the learner's ranks are on other "
                    "nodes than the driver: the parts of a checkpoint would not come together",
                    "--shared DIR, a folder that all nodes see; checkpoint.remote copies what is there")  # fmt: skip
        _refuse(f"report.directory={directory} is on one node's own disk: when that node goes, the checkpoints go",
                "--shared DIR, a folder that all nodes see, or set checkpoint.remote=s3://…")  # fmt: skip


def _inside(directory: str, shared: str) -> bool:
    """Whether a run's folder is in the shared one. The run starts there, so that a relative path is."""
    path = PurePosixPath(directory)
    return ".." not in path.parts and (not path.is_absolute() or path.is_relative_to(shared))


def _refuse(what: str, fix: str) -> None:
    raise ConfigError("RLKD-C441", what, where="report.directory", fix=fix)
