"""Asked of the cluster before a run is submitted, by a small job there (probe.py): is everything that the run needs?

versions   Python, Ray and rlkd are those of here; what the engines import is installed
room       GPUs and CPUs, free now
storage    the run's folder is the same one on every node that may have a learner
files      what the recipe names by path, and does not travel in the package
"""

import json
import platform
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.core.errors import PreflightError, Problem
from rlkd.submit.jobs import Job, Jobs, NoSuchJob, Unanswered
from rlkd.submit.needs import Node, has, lacking, may_have, needs, node_of, total, words
from rlkd.submit.package import PROBE, Package
from rlkd.submit.probe import MARK
from rlkd.workers.placement import Bundle

SAME = ("python", "ray", "rlkd")  # must be those of here
INSTALLED = ("torch", "transformers", "deepspeed")
PROBE_S = 90.0  # until the small job has answered: a node may have to unpack the package first
NODE_S = 15.0  # of that, for all nodes
LOOK_S = 0.3
GPU = "rlkd_gpu"  # in a job's metadata: it was planned on GPUs
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """What the cluster says of itself."""

    nodes: tuple[Node, ...]
    versions: Mapping[str, str | None]
    unwritable: str | None = None  # why the run's folder cannot be written
    config: Mapping[str, Any] | None = None  # config.json of the model
    error: str | None = None  # why a driver cannot join it

    @property
    def gpu(self) -> bool:
        return any(node.all.get("GPU", 0.0) > 0 for node in self.nodes)


def asked(jobs: Jobs, name: str, package: Package, runtime_env: Mapping[str, Any], python: str, say: Say) -> Cluster:
    """Run probe.py on the cluster; PreflightError if it does not answer in time, Unanswered if the cluster does not."""
    job_id = f"{name}~preflight-{uuid.uuid4().hex[:6]}"
    question = {
        "folder": package.run_folder.rpartition("/")[0],
        "paths": dict(package.on_nodes),
        "packages": [*SAME[1:], *INSTALLED],
        "model": next((path for key, path in package.on_nodes.items() if key.endswith("model.path")), None),
        "node_s": NODE_S,
    }
    entrypoint = shlex.join([python, PROBE, json.dumps(question)])
    jobs.submit(job_id, f"exec {entrypoint}", runtime_env, {"rlkd": "preflight"})
    try:
        return _answer(jobs, job_id, python, say)
    finally:
        _away(jobs, job_id)


def _answer(jobs: Jobs, job_id: str, python: str, say: Say) -> Cluster:
    began, told = time.monotonic(), 0.0
    job, log = Job(job_id, "PENDING"), ""
    while (waited := time.monotonic() - began) < PROBE_S:
        try:
            job, log = jobs.get(job_id), jobs.log(job_id)
        except Unanswered as error:
            say(f"preflight: {error}; asked again")
        if lines := [line[len(MARK) :] for line in log.splitlines() if line.startswith(MARK)]:
            return _cluster(json.loads(lines[-1]))
        if job.over:
            break
        if waited - told > 10:
            told = waited
            say(f"preflight: the small job that looks at the cluster is {job.status} since {waited:.0f} s")
        time.sleep(LOOK_S)
    how = f"is still {job.status} after {PROBE_S:.0f} s" if not job.over else "failed"
    last = " ".join((log or job.message).strip().splitlines()[-3:])[-400:]
    fix = f"does `{python}` start the Python that has Ray there? --python says another; the job's log has more"
    raise PreflightError("RLKD-E238", f"the small job that looks at the cluster {how}: {last}", jobs.address, fix)


def _cluster(said: Mapping[str, Any]) -> Cluster:
    return Cluster(
        tuple(map(node_of, said["nodes"])), said["versions"], said["unwritable"], said["config"], said["error"]
    )


def _away(jobs: Jobs, job_id: str) -> None:
    """The small job leaves no trace in the list of jobs, if the cluster can be reached."""
    with suppress(Unanswered, NoSuchJob):
        until = time.monotonic() + 5
        while not jobs.get(job_id).over and time.monotonic() < until:
            time.sleep(LOOK_S)
        if not jobs.get(job_id).over:
            jobs.stop(job_id)
        else:
            jobs.delete(job_id)


def judged(cluster: Cluster, configs: Sequence[Config], package: Package, address: str, gpu: bool = False) -> str:
    """What fits, in words. PreflightError with everything that does not, but for room (see `short`)."""
    wanted = [needs(config, _on_gpu(config, cluster, gpu)) for config in configs]
    problems = [*_versions(cluster, address), *_storage(cluster, package, wanted), *_files(cluster, package)]
    if cluster.error is not None and not problems:
        fix = "is it the Python, and the Ray, that the cluster was started with?"
        problems.append(Problem("RLKD-E238", f"a driver cannot join the cluster: {cluster.error}", address, fix))
    if problems:
        raise PreflightError.of(problems)
    need = [total(bundles) for bundles in wanted]
    most = {kind: max(n[kind] for n in need) for kind in need[0]}
    silent = [node.address for node in cluster.nodes if node.sees is None]
    quiet = f"; {', '.join(silent)} did not say what is there" if silent else ""
    return f"preflight on the cluster: ok (needs {words(most)}; {has(cluster.nodes)}){quiet}"


def short(cluster: Cluster, configs: Sequence[Config], gpu: bool = False) -> str | None:
    """What room is missing, for one of the stages at least; None if there is enough. `gpu`: the run had GPUs before,
    and is not to go on without."""
    found = (lacking(needs(config, _on_gpu(config, cluster, gpu)), cluster.nodes) for config in configs)
    return next((text for text in found if text is not None), None)


def _on_gpu(config: Config, cluster: Cluster, gpu: bool) -> bool:
    return config.model.device == "cuda" or ((gpu or cluster.gpu) and config.model.device != "cpu")


def gives_gpu(cluster: Cluster, stages: Sequence[Stage]) -> bool:
    """Whether the run is planned on GPUs there."""
    return cluster.gpu and any(stage.config.model.device != "cpu" for stage in stages)


def had_gpu(attempts: Iterable[Job]) -> bool:
    """Whether one of them was planned on GPUs, by whichever client."""
    return any(job.told(GPU) for job in attempts)


def on_gpu(stages: Sequence[Stage]) -> list[str]:
    """Settings with which a run stays on GPUs where its recipe leaves that open: a cluster may lose its last one
    before the driver looks."""
    return [
        f"{f'stages.{stage.name}.' if stage.name else ''}model.device=cuda"
        for stage in stages
        if stage.config.model.device == "auto"
    ]


def here() -> dict[str, str]:
    """The versions of this machine."""
    return {"python": platform.python_version(), **{name: version(name) for name in SAME[1:]}}


def _versions(cluster: Cluster, address: str) -> list[Problem]:
    """Of the driver's node, and of every other that differs from it."""
    others = {n.name: n.versions for n in cluster.nodes if n.versions is not None and n.versions != cluster.versions}
    fix = "install the same versions on both sides; where nodes are images, submit from the same image"
    return [
        Problem("RLKD-E231", "; ".join(different), where, fix)
        for where, theirs in {address: cluster.versions, **others}.items()
        if (different := _different(theirs))
    ]


def _different(theirs: Mapping[str, str | None]) -> list[str]:
    ours = here()
    found = [
        f"{name} is {theirs.get(name) or 'not installed'} there and {ours[name]} here"
        for name in SAME
        if not _same(name, theirs.get(name), ours[name])
    ]
    return found + [f"{name} is not installed there" for name in INSTALLED if theirs.get(name) is None]


def _same(name: str, theirs: str | None, ours: str) -> bool:
    """Python's third number makes no difference that matters here."""
    if name == "python" and theirs is not None:
        return theirs.split(".")[:2] == ours.split(".")[:2]
    return theirs == ours


def _storage(cluster: Cluster, package: Package, wanted: Sequence[Sequence[Bundle]]) -> list[Problem]:
    """The run's folder must be writable, and one and the same wherever a learner may be."""
    fix = "report.directory=PATH on a disk that every node has (NFS, EFS, a mounted bucket)"
    if cluster.unwritable is not None:
        what = f"the run's folder cannot be written on the cluster: {cluster.unwritable}"
        return [Problem("RLKD-E233", what, "report.directory", fix)]
    learners = [bundle for bundles in wanted for bundle in bundles if bundle.learner]
    blind = [n.name for n in cluster.nodes if n.sees is False and any(may_have(n, b, cluster.nodes) for b in learners)]
    if not blind:
        return []
    what = f"{package.run_folder} is another folder on {', '.join(blind)}: learners there could not save into the run's"
    return [Problem("RLKD-E233", what, "report.directory", fix)]


def _files(cluster: Cluster, package: Package) -> list[Problem]:
    problems = []
    for key, path in package.on_nodes.items():
        without = [node.name for node in cluster.nodes if key in node.missing]
        if without:
            few = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            fix = "put it there, or on a path that every node has; " + (
                "small data travels with the job when its path is relative" if "data" in key else f"then {key}=PATH"
            )
            problems.append(Problem("RLKD-E235", f"{path} is not on {few}", key, fix))
    return problems
