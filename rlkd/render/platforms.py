"""The files of each platform, by name."""

import json
from collections.abc import Mapping
from typing import Any

from rlkd.render.clouds import CLOUDS, instance
from rlkd.render.job import SPARE_S, Job
from rlkd.render.nodes import Kind, Layout, Machine
from rlkd.render.settings import Settings
from rlkd.render.text import fill

NEW_CLUSTERS = 3  # that a RayJob makes after the first was lost with its head


def kuberay(job: Job, layout: Layout, settings: Settings) -> Mapping[str, str]:
    """RayJob: a cluster for this run alone, gone at its end. RayCluster: one that stays, for `rlkd submit`."""
    values = {
        "job": job,
        "layout": layout,
        "settings": settings,
        "groups": [_group(k, job, settings) for k in layout.kinds],
    }
    script = fill("train.sh.j2", job=job, retries=settings.retries)
    return {
        "rayjob.yaml": fill("rayjob.yaml.j2", **values, script=script, new_clusters=NEW_CLUSTERS),
        "raycluster.yaml": fill("raycluster.yaml.j2", **values),
    }


def _group(kind: Kind, job: Job, settings: Settings) -> dict[str, Any]:
    """What a pod of this kind says. A preemptible node is killed after its notice, whatever a pod asks for."""
    stable = kind.stable
    drain_s = job.grace_s if stable else min(job.grace_s, settings.notice_s - 5)
    params = {}
    if kind.name == "head" and kind.machine.gpus == 0 and job.gpu:
        params["num-cpus"] = "0"  # the driver alone: nobody else is put there
    if stable:
        params["resources"] = json.dumps(json.dumps({"stable": 1}))  # in quotes, for KubeRay's shell
    return {
        "kind": kind,
        "drain_s": drain_s,
        "termination_s": drain_s + SPARE_S if stable else settings.notice_s,
        "params": params,
        "selector": dict(settings.stable if stable else settings.preemptible),
        "tolerations": () if stable else settings.tolerations,
    }


def slurm(job: Job, nodes: int, stable: int, node: Machine, settings: Settings) -> Mapping[str, str]:
    """One batch script: Ray on all nodes of the job, the driver on the first; the first `stable` are the learner's."""
    values = {"job": job, "nodes": nodes, "stable": stable, "node": node, "settings": settings}
    return {"job.sbatch": fill("job.sbatch.j2", **values)}


def docker(job: Job, nodes: int, node: Machine, settings: Settings) -> Mapping[str, str]:
    """An image, and one container on this machine if that is enough."""
    values = {"job": job, "node": node, "settings": settings}
    files = {
        "Dockerfile": fill(f"Dockerfile.{'gpu' if job.gpu else 'cpu'}.j2", **values),
        "Dockerfile.dockerignore": fill("dockerignore.j2", **values),
    }
    return files if nodes > 1 else {**files, "run.sh": fill("run.sh.j2", **values)}


def ray_up(job: Job, layout: Layout, settings: Settings) -> Mapping[str, str]:
    """A file for `ray up` on AWS, one for GCP."""
    return {f"{cloud}.yaml": _cloud(cloud, job, layout, settings) for cloud in CLOUDS}


def _cloud(cloud: str, job: Job, layout: Layout, settings: Settings) -> str:
    types = [{"kind": kind, "instance": instance(cloud, kind.machine.gpus)} for kind in layout.kinds]
    return fill("ray-up.yaml.j2", cloud=cloud, job=job, layout=layout, settings=settings, types=types)
