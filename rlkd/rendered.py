"""`rlkd render`: from a recipe to the files of a platform.

The nodes come from the bundles that the run itself will ask for (workers/placement.py), the notice from what a save
takes (plan/saving.py), the rest from the command line.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.plan.hardware import GIB, GPUS, cpu
from rlkd.plan.memory import learner_host
from rlkd.plan.saving import Grace
from rlkd.plan.saving import grace as grace_of
from rlkd.plan.shape import shape_of
from rlkd.plan.work import assumed, work_of
from rlkd.render import platforms
from rlkd.render.job import Job, added, check_storage, on_nodes
from rlkd.render.nodes import Layout, Machine, Needs, Packed, by_kind, equal_node, packed
from rlkd.render.settings import Settings
from rlkd.report import secrets
from rlkd.report.files import replace_file
from rlkd.submit.package import models
from rlkd.teachers import workers_of
from rlkd.workers.placement import bundles

MARK = "Rendered by: "
GPUS_OF_A_NODE = 8  # where the recipe asks for GPUs and the user does not say
CPU_NODE = Machine(0, 4, 16)  # of a run without GPUs; and what carries drivers and rewards beside GPU nodes
SMALL_NODE = Machine(0, 8, 32)
CPUS_OF_A_GPU, GIB_OF_A_GPU = 8, 64
DRIVER_GIB = 4.0  # for the driver, Ray, and what the system keeps


@dataclass(frozen=True)
class Nodes:
    """What the user says of the platform's nodes; None: a default."""

    gpus: int | None = None
    cpus: int | None = None
    memory_gib: int | None = None


def render(
    stages: Sequence[Stage], recipe: str, overrides: Sequence[str], platform: str, out: Path,
    nodes: Nodes, settings: Settings, grace_s: int | None = None, said: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the files into `out`; what was written, for people and for programs.

    `grace_s`: seconds between SIGTERM and the kill; None: what the plan says. `said`: the options of the command, for
    the files' first lines. ConfigError RLKD-C441 to C447; PreflightError RLKD-E186 if a file in `out` is not ours.
    """
    configs = [stage.config for stage in stages]
    node = machine(configs, nodes)
    needs = Needs.most([_needs(config, node.gpus > 0) for config in configs])
    layout = by_kind(needs, node, SMALL_NODE if node.gpus else node)
    equal, node = packed(needs, node), equal_node(needs, node)
    _check_memory(needs, node, nodes.memory_gib)
    apart = equal.with_learner > 1 if platform == "slurm" else any(k.name == "learner" for k in layout.workers)
    check_storage(configs, platform, settings, apart)
    _check_sync(configs, {"docker": 1, "slurm": equal.nodes}.get(platform, layout.nodes))
    grace = None if grace_s is not None else _grace(configs)
    total_s = grace_s if grace is None else grace.total_s
    job = _job(configs[0], recipe, overrides, platform, settings, int(total_s or 0), node, said)
    files = _files(platform, job, layout, equal, node, settings)
    return _written(files, out, _facts(platform, job, layout, equal, node, grace))


def machine(configs: Sequence[Config], nodes: Nodes) -> Machine:
    """The platform's node. ConfigError RLKD-C444 if the recipe and the command line disagree about GPUs."""
    devices = {config.model.device for config in configs}
    gpus = nodes.gpus if nodes.gpus is not None else GPUS_OF_A_NODE if "cuda" in devices else 0
    if gpus and "cpu" in devices:
        fix = "leave --gpus-per-node out, or model.device=auto"
        raise ConfigError("RLKD-C444", f"--gpus-per-node {gpus}, but model.device=cpu", "model.device", fix)
    if not gpus and "cuda" in devices:
        fix = "leave --gpus-per-node out, or model.device=cpu"
        raise ConfigError("RLKD-C444", "--gpus-per-node 0, but model.device=cuda", "model.device", fix)
    default = Machine(gpus, CPUS_OF_A_GPU * gpus, GIB_OF_A_GPU * gpus) if gpus else CPU_NODE
    return replace(
        default,
        cpus=default.cpus if nodes.cpus is None else nodes.cpus,
        memory_gib=default.memory_gib if nodes.memory_gib is None else nodes.memory_gib,
    )


def _check_memory(needs: Needs, node: Machine, said_gib: int | None) -> None:
    """ConfigError RLKD-C447 if the user's nodes have not the memory that the learner's ranks need beside their GPUs."""
    if said_gib is not None and node.memory_gib > said_gib:
        ranks = needs.ranks_on(node)
        what = (
            f"a node with {ranks} learner rank{'s' if ranks > 1 else ''} needs {node.memory_gib} GiB of its own memory"
        )
        fix = f"--memory-gib {node.memory_gib}, fewer GPUs a node, or learner.offload=false (`rlkd plan` has the parts)"
        raise ConfigError("RLKD-C447", f"{what}, and has {said_gib}", "--memory-gib", fix)


def _check_sync(configs: Sequence[Config], nodes: int) -> None:
    """ConfigError RLKD-C445 if weights would go through the memory of one node."""
    if nodes > 1 and any(config.sync.kind == "shm" for config in configs):
        what = f"sync.kind=shm passes weights through the memory of one node, and this run has {nodes}"
        raise ConfigError("RLKD-C445", what, where="sync.kind", fix="sync.kind=auto, or leave it out")


def _needs(config: Config, gpu: bool) -> Needs:
    s = config.sampler
    most, frozen = s.max_workers or s.workers, workers_of(config)
    wanted = bundles(
        config.learner.ranks, most, s.tensor_parallel, config.verifier.workers, frozen, gpu, config.ray.share_gpus
    )
    least = s.workers if s.min_workers is None else s.min_workers
    shape, hardware = (
        shape_of(config.model.path),
        GPUS["H100"] if gpu else cpu(0.0, CPU_NODE.cpus),
    )  # any: bytes are bytes
    rank, one = learner_host(config, shape, work_of(config, assumed(config, shape)), hardware)
    actors = Needs.of([(b.role, b.resources) for b in wanted], least, config.ray.share_gpus)
    return replace(actors, rank_gib=rank / GIB, node_gib=one / GIB + DRIVER_GIB)


def _grace(configs: Sequence[Config]) -> Grace:
    """Of the stage that needs most."""
    found = []
    for config in configs:
        run = Path(config.report.directory) / config.name
        found.append(grace_of(config, shape_of(config.model.path), run=run if run.is_dir() else None))
    return max(found, key=lambda g: g.total_s)


def _job(
    config: Config, recipe: str, overrides: Sequence[str], platform: str, settings: Settings, grace_s: int,
    node: Machine, said: Sequence[str],
) -> Job:  # fmt: skip
    words = [*overrides, *added(config, platform, grace_s, settings.wait_s, node.gpus > 0)]
    by = MARK + shlex.join(["rlkd", "render", recipe, *overrides, "--for", platform, *said])
    for text in (recipe, *words, *said):
        if not text.isprintable():
            raise ConfigError("RLKD-C443", f"{text!r}", where="command line", fix="one line of text")
        if secrets.without(text) != text:
            raise ConfigError(
                "RLKD-C446",
                "a secret on the command line would stand in the rendered files",
                where=secrets.without(text),
                fix="name its environment variable in the recipe (key_env, ${oc.env:NAME}), and give the nodes that",
            )
    directory = None if platform == "docker" else settings.shared
    named = tuple(on_nodes({**models(config), "report.directory": config.report.directory}, directory))
    return Job(config.name, recipe, tuple(words), directory, grace_s, node.gpus > 0, version("ray"), by, named)


def _files(
    platform: str, job: Job, layout: Layout, equal: Packed, node: Machine, settings: Settings
) -> Mapping[str, str]:
    if platform == "kuberay":
        return platforms.kuberay(job, layout, settings)
    if platform == "slurm":
        return platforms.slurm(job, equal.nodes, equal.stable, node, settings)
    if platform == "docker":
        return platforms.docker(job, equal.nodes, node, settings)
    return platforms.ray_up(job, layout, settings)


def _facts(
    platform: str, job: Job, layout: Layout, equal: Packed, node: Machine, grace: Grace | None
) -> dict[str, Any]:  # fmt: skip
    """What the files say, in numbers and in words."""
    if platform in ("slurm", "docker"):
        nodes = equal.nodes
        rows = [f"{nodes} × {_size(node)}: the driver and all workers"]
        notes: tuple[str, ...] = (f"{equal.idle} of the {nodes * node.gpus} GPUs stay idle",) if equal.idle else ()
        if platform == "docker" and nodes > 1:
            notes += (f"run.sh is left out: the run takes {nodes} such machines; the image is for the other platforms",)
    else:
        rows = [
            f"{k.count} × {_size(k.machine)}: {k.carries} ({k.name}, {'stable' if k.stable else 'preemptible'})"
            for k in layout.kinds
        ]
        notes = layout.notes
        nodes = layout.nodes
    lines = [f"{'nodes' if not i else '':<10} {row}" for i, row in enumerate(rows)]
    lines.append(f"grace      {job.grace_s} s between SIGTERM and the kill{_reckoned(grace)}")
    lines.append(f"command    {job.command}" + (f"\n           in {job.directory}" if job.directory else ""))
    lines += [f"note       {note}" for note in notes]
    return {"platform": platform, "nodes": nodes, "grace_s": job.grace_s, "command": job.command, "lines": lines}


def _size(machine: Machine) -> str:
    gpus = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}, " if machine.gpus else ""
    return f"{gpus}{machine.cpus} CPUs, {machine.memory_gib} GiB"


def _reckoned(grace: Grace | None) -> str:
    if grace is None:
        return ": --grace"
    of = "measured" if grace.measured else "predicted"
    upload = f", copying {grace.upload_s:.0f} s" if grace.upload_s else ""
    return f": a step {grace.drain_s:.0f} s, saving {grace.save_s:.0f} s ({of}){upload}"


def _written(files: Mapping[str, str], out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write them, unless one is there that rlkd did not render."""
    for name in files:
        path = out / name
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise PreflightError(
                "RLKD-E186",
                "this file is there, and was not rendered by rlkd",
                where=str(path),
                fix="give another --out, or move it away",
            )
    for name, text in files.items():
        replace_file(out / name, text)
        if text.startswith("#!"):
            (out / name).chmod(0o755)
    lines = facts.pop("lines") + [f"wrote      {out / name}" for name in files]
    return {**facts, "files": [str(out / name) for name in files], "text": "\n".join(lines)}
