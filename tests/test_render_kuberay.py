"""The KubeRay files are what KubeRay and Kubernetes read, whatever the options; train.sh repeats what is worth it."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from rlkd.render.job import Job
from rlkd.render.nodes import Machine, Needs, by_kind
from rlkd.render.platforms import kuberay
from rlkd.render.settings import Settings, Toleration
from tests.render_help import CLUSTER

STUBS = Path(__file__).parent / "render_stubs"
SCHEMA = json.loads((Path(__file__).parent / "cluster_schemas" / "kuberay.json").read_text())
KUBERNETES = "kubernetes-json-schema/v1.31.0-local-strict"
FILES = sorted(CLUSTER.glob("*/kuberay/*.yaml"))

Object = dict[str, Any]


def objects(text: str) -> dict[str, Object]:
    """By kind."""
    return {thing["kind"]: thing for thing in yaml.load_all(text, yaml.CSafeLoader)}


def cluster_of(thing: Object) -> Object:
    return thing["spec"].get("rayClusterSpec", thing["spec"])


def groups(thing: Object) -> dict[str, Object]:
    spec = cluster_of(thing)
    return {"head": spec["headGroupSpec"], **{g["groupName"]: g for g in spec.get("workerGroupSpecs", [])}}


@functools.cache
def schema_of(kind: str) -> Draft7Validator | Draft202012Validator:
    """KubeRay's kinds by its definitions, Kubernetes' own by the strict schemas of kubernetes-validate."""
    if kind.startswith("Ray"):
        return Draft7Validator({**SCHEMA, "$ref": f"#/definitions/{kind}"})
    own, all_ = (schema_contents(f"{KUBERNETES}/{name}.json", "") for name in (f"{kind.lower()}-v1", "_definitions"))
    registry = Resource.from_contents(all_) @ (Resource.from_contents(own) @ Registry())
    return Draft202012Validator(own, registry=registry.crawl())


def check(text: str) -> dict[str, Object]:
    """Every object of the file against the schemas; returned by kind."""
    found = objects(text)
    for kind, thing in found.items():
        schema_of(kind).validate(thing)
        for group in groups(thing).values() if kind.startswith("Ray") else ():
            schema_of("Pod").validate({"apiVersion": "v1", "kind": "Pod", **group["template"]})
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parts[-3]}-{p.name}")
def test_the_examples_fit_the_schemas(file: Path) -> None:
    assert set(check(file.read_text())) == ({"ConfigMap", "RayJob"} if file.name == "rayjob.yaml" else {"RayCluster"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backoffLimit: 3", "backofLimit: 3"),
        ("shutdownAfterJobFinishes: true", 'shutdownAfterJobFinishes: "yes"'),
        ("backoffLimit: 3", "backoffLimit: three"),
        ("minReplicas: 1", "minReplica: 1"),
        ("terminationGracePeriodSeconds", "terminationGracePeriod"),
        ("mountPath: ", "mounthPath: "),
        ("effect: NoSchedule", "efect: NoSchedule"),
        ('name: "grpo-tiny"\nspec', 'name: "Grpo_tiny"\nspec'),
    ],
)
def test_a_misspelt_field_is_found(old: str, new: str) -> None:
    text = (CLUSTER / "grpo-tiny/kuberay/rayjob.yaml").read_text()
    assert old in text
    with pytest.raises(Exception, match=r"(?i)additional|valid|not of type|not one of|required|match"):
        check(text.replace(old, new))


def test_who_is_on_which_nodes() -> None:
    found = groups(objects((CLUSTER / "dapo-qwen2.5-32b/kuberay/raycluster.yaml").read_text())["RayCluster"])
    assert {name: g.get("replicas", 1) for name, g in found.items()} == {
        "head": 1,
        "learner": 8,
        "rollout": 8,
        "reward": 1,
    }
    for name, group in found.items():
        pod, stays = group["template"]["spec"], name in ("head", "learner")
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == {"learner": "8", "rollout": "8"}.get(name)
        assert limits == pod["containers"][0]["resources"]["requests"]
        assert ("stable" in group["rayStartParams"].get("resources", "")) is stays
        assert ("tolerations" in pod) is not stays
        spot = {"cloud.google.com/gke-spot": "true"}
        assert pod["nodeSelector"] == ({"rlkd/pool": "stable"} if stays else spot)
    assert found["head"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_reads_the_resources() -> None:
    """KubeRay puts the parameters into a shell command."""
    head = groups(objects((CLUSTER / "grpo-tiny/kuberay/rayjob.yaml").read_text())["RayJob"])["head"]
    (word,) = shlex.split(head["rayStartParams"]["resources"])
    assert json.loads(word) == {"stable": 1}


def test_the_times_agree() -> None:
    """Ray's drain ends before Kubernetes kills; a node that may go claims no more than its notice."""
    for file in FILES:
        found = objects(file.read_text())
        thing = found.get("RayJob") or found["RayCluster"]
        for name, group in groups(thing).items():
            pod = group["template"]["spec"]
            (drain,) = [e["value"] for e in pod["containers"][0]["env"] if e["name"].endswith("DRAIN_TIMEOUT_S")]
            assert 0 < int(drain) < pod["terminationGracePeriodSeconds"]
            if name not in ("head", "learner"):
                assert pod["terminationGracePeriodSeconds"] == 30
        if "RayJob" in found:
            head = groups(thing)["head"]["template"]["spec"]
            stop = yaml.safe_load(thing["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
            assert head["terminationGracePeriodSeconds"] == int(stop) + 30


PLAIN = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20).filter(str.isprintable)
KEYS = st.sampled_from(["a", "a.b/c", "x_y", "0"])
VALUES = st.sampled_from(["", "true", "1", "null", "a.b", "no"])


@settings(max_examples=12, deadline=None)
@given(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    PLAIN,
    st.dictionaries(KEYS, VALUES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_text_stays_the_text_it_is(
    recipe: str, overrides: list[str], folder: str, labels: dict[str, str], gpu: bool, claim: bool, secret: bool
) -> None:
    shared = f"/{folder}" if ".." not in folder else "/s"
    job = Job("Run.1", recipe, tuple(overrides), shared if claim else None, 70, gpu, "2.60.0", "Rendered by: x")
    said = Settings(
        "rlkd:x", shared if claim else None, "c" if claim else None, "s" if secret else None, labels, labels,
        (Toleration("a", "true", "NoSchedule"), Toleration("b", None, "NoExecute")),
    )  # fmt: skip
    gpus = 8.0 if gpu else 0.0
    wanted = Needs((gpus / 8,) * 16 if gpu else (0.0,), (gpus,), (gpus / 8,), 1, 1)
    node = Machine(8, 64, 512) if gpu else Machine(0, 2, 8)
    files = kuberay(job, by_kind(wanted, node, Machine(0, 8, 32)), said)
    found = {kind: thing for text in files.values() for kind, thing in check(text).items()}
    assert (
        found["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]["rlkd/run"]
        == "run-1"
    )
    script = found["ConfigMap"]["data"]["train.sh"]
    (line,) = [line for line in script.splitlines() if line.strip().startswith("rlkd train")]
    assert shlex.split(line.strip().removesuffix(" &")) == ["rlkd", "train", recipe, *overrides]
    for group in groups(found["RayCluster"]).values():
        pod = group["template"]["spec"]
        assert pod.get("nodeSelector", {}) == labels
        container = pod["containers"][0]
        assert container.get("workingDir") == (shared if claim else None)
        assert ("envFrom" in container) is secret
        if claim:
            assert container["volumeMounts"][0]["mountPath"] == shared


# -- train.sh, run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    found = objects((CLUSTER / "grpo-tiny/kuberay/rayjob.yaml").read_text())["ConfigMap"]["data"]["train.sh"]
    path = tmp_path / "train.sh"
    path.write_text(found.replace("/work", str(tmp_path)))
    return path


def start(script: Path, ends: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ, "PATH": f"{STUBS}:{os.environ['PATH']}", "STUBS": str(script.parent), "ENDS": ends,
        "RLKD_PAUSE": "0",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def attempts(script: Path) -> int:
    return (script.parent / "calls").read_text().count("rlkd train")


@pytest.mark.parametrize(
    ("ends", "code", "tries"), [("0", 0, 1), ("75 75 0", 0, 3), ("75 3", 3, 2), ("2", 2, 1), ("6", 6, 1)]
)
def test_only_an_interruption_is_repeated(script: Path, ends: str, code: int, tries: int) -> None:
    process = start(script, ends)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, attempts(script)) == (code, tries)
    assert said.count("interrupted and saved (exit 75)") == tries - (ends.split()[-1] != "75")


def test_it_is_not_repeated_for_ever(script: Path) -> None:
    text = script.read_text()
    assert "-gt 20 ]" in text
    script.write_text(text.replace("-gt 20 ]", "-gt 2 ]"))
    process = start(script, " ".join(["75"] * 30))
    _, said = process.communicate(timeout=30)
    assert (process.returncode, attempts(script)) == (75, 3)
    assert "interrupted 20 times; the last checkpoint stands" in said


@pytest.mark.parametrize("whole_group", [True, False])
def test_who_stops_the_job_gets_a_save_and_no_repetition(script: Path, whole_group: bool) -> None:
    """`ray job stop` signals the process group; other platforms the script alone."""
    process = start(script, "term 0")
    until = time.monotonic() + 20
    while not (script.parent / "training").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    calls = (script.parent / "calls").read_text()
    assert process.returncode == 75
    assert "rlkd-saved" in calls
    assert attempts(script) == 1


def test_a_folder_that_is_not_there_is_named(script: Path) -> None:
    text = script.read_text()
    script.write_text(re.sub(r"(?m)^cd \S+", "cd /nowhere", text))
    process = start(script, "0")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "is the volume mounted?" in said
