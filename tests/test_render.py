"""`rlkd render`: what is refused, what the command line does; and cluster/ is what it makes today."""

import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlkd import cli
from rlkd.cli_render import _settings
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError
from rlkd.render.job import LONGEST, Job, check_storage
from rlkd.render.settings import Settings, labels, platform, tolerations
from rlkd.report.secrets import KNOWN
from tests.render_help import CLUSTER, DAPO, DEMO, EXAMPLES, ROOT, place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(words: str) -> Any:
    return CliRunner().invoke(cli.app, ["render", *shlex.split(words)])


def refused(words: str) -> str:
    """What stderr says; the exit code is that of usage."""
    result = invoke(words)
    assert result.exit_code == 2, result.output
    return str(result.stderr)


# -- cluster/ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", EXAMPLES)
def test_the_examples_are_what_render_makes_today(folder: str, here: Path) -> None:
    result = invoke(f"{EXAMPLES[folder]} --out out")
    assert result.exit_code == 0, result.output
    made = {p.name: p.read_text() for p in (here / "out").iterdir()}
    kept = {p.name: p.read_text() for p in (CLUSTER / folder).iterdir()}
    assert made == kept, "cluster/ is old: python -m tests.render_help makes it again"


def test_nothing_else_is_in_cluster() -> None:
    there = {str(p.parent.relative_to(CLUSTER)) for p in CLUSTER.rglob("*") if p.is_file()}
    assert there == set(EXAMPLES)


# -- what does not fit the nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"{DAPO} learner.ranks=20 --for kuberay", "20 are not whole nodes of 8 GPUs: 4 GPUs would be left over"),
        (f"{DAPO} learner.ranks=20 --for slurm", "learner.ranks=16, or nodes of so many GPUs: 1, 2, 4, 5, 10"),
        (f"{DAPO} --for kuberay --gpus-per-node 6 learner.ranks=6", "tensor_parallel=4 does not divide the 6 GPUs"),
        (f"{DAPO} --for slurm --gpus-per-node 2 learner.ranks=2", "nodes of 4 GPUs or a multiple"),
        (f"{DAPO} --for slurm --cpus-per-node 2", "81 actors take a CPU each, and 16 nodes of 2 CPUs have 32"),
        (f"{DAPO} --for ray-up --gpus-per-node 16", "no machine of aws here has 16 GPUs; p5.48xlarge has 8"),
        (f"{DAPO} --for slurm --gpus-per-node 0", "--gpus-per-node 0, but model.device=cuda"),
        (f"{DEMO} model.device=cpu --for slurm --gpus-per-node 1", "--gpus-per-node 1, but model.device=cpu"),
    ],
)
def test_what_does_not_fit_the_nodes(words: str, says: str, here: Path) -> None:
    assert says in refused(f"{words} --shared /s --claim c")
    assert not (here / "rendered").exists()


# -- where checkpoints are ---------------------------------------------------------------------------------------------


@functools.cache
def demo() -> Config:
    return load(ROOT / DEMO)


def unsafe(name: str, directory: str, remote: str | None = None, shared: str | None = None, apart: bool = False) -> str:
    """Why a run's folder may not be there on this platform; nothing if it may."""
    config = replace(
        demo(), report=replace(demo().report, directory=directory), checkpoint=replace(demo().checkpoint, remote=remote)
    )
    try:
        check_storage([config], name, Settings("x", shared, "c" if shared else None), apart)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["kuberay", "slurm", "ray-up"])
def test_checkpoints_on_one_nodes_disk_are_refused(name: str) -> None:
    said = unsafe(name, "runs")
    assert "report.directory=runs is on one node's own disk: when that node goes, the checkpoints go" in said
    assert "--shared DIR" in said
    assert "checkpoint.remote=s3://" in said
    assert "RLKD-C441" in said
    for outside in ("/tmp/runs", "../runs", "/shared/runs"):
        said = unsafe(name, outside, shared="/s")
        assert f"report.directory={outside} is not in /s, the folder that all nodes see" in said
    assert unsafe(name, "runs", shared="/s", apart=True) == ""
    assert unsafe(name, "/s/runs", shared="/s", apart=True) == ""
    assert unsafe(name, "runs", remote="s3://bucket/x") == ""
    assert "the parts of a checkpoint would not come together" in unsafe(name, "runs", "s3://bucket/x", apart=True)


@pytest.mark.usefixtures("here")
def test_the_command_refuses_them() -> None:
    assert "report.directory=runs is on one node's own disk" in refused(f"{DEMO} --for slurm")
    for name in ("slurm", "kuberay"):
        said = refused(f"{DAPO} checkpoint.remote=s3://bucket/x sync.kind=auto --for {name}")
        assert "the parts of a checkpoint would not come together" in said


def test_docker_wants_paths_below_where_it_starts() -> None:
    assert "is inside the container" in unsafe("docker", "/data/runs")
    assert unsafe("docker", "/data/runs", "s3://bucket/x") == ""
    assert unsafe("docker", "runs") == ""


@pytest.mark.usefixtures("here")
def test_memory_that_offloading_needs() -> None:
    """7B with ZeRO-2 offloaded: 16 bytes a parameter, and two versions of the weights, lie in the node's memory."""
    luffy = "configs/paper/luffy-qwen2.5-math-7b.yaml learner.ranks=1 learner.zero_stage=2 learner.offload=true"
    words = f"{luffy} --for slurm --shared /s --gpus-per-node 8"
    said = refused(f"{words} --memory-gib 64")
    assert "RLKD-C447" in said
    assert "a node with 1 learner rank needs" in said
    (needed,) = re.findall(r"needs (\d+) GiB", said)
    parameters = 7.6e9
    assert int(needed) == pytest.approx((16 * parameters + 2 * 2 * parameters) / 2**30 + 4.75, abs=4)
    assert invoke(f"{words} --memory-gib {needed}").exit_code == 0


@pytest.mark.usefixtures("here")
def test_shared_memory_is_of_one_node() -> None:
    assert "sync.kind=shm passes weights through the memory of one node" in refused(
        f"{DEMO} sync.kind=shm --for kuberay --shared /s --claim c"
    )
    assert invoke(f"{DEMO} sync.kind=shm --for slurm --shared /s").exit_code == 0  # one node


# -- grace -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "least"), [(DEMO, 60), (DAPO, 100)])
def test_the_grace_is_the_plans(recipe: str, least: int, here: Path) -> None:
    from rlkd.plan.saving import grace
    from rlkd.plan.shape import shape_of

    config = load(recipe)
    planned = grace(config, shape_of(config.model.path)).total_s
    assert planned >= least
    for name, file in (("kuberay", "rayjob.yaml"), ("slurm", "job.sbatch")):
        result = invoke(f"{recipe} --for {name} --shared /s --claim c --out {name} --json")
        assert json.loads(result.stdout)["grace_s"] == planned
        text = (here / name / file).read_text()
        wanted = [f"TERM@{planned}", f"_TIMEOUT_S={planned}", f"preempt.grace_s={planned}"]
        if name == "kuberay":
            wanted = [f"terminationGracePeriodSeconds: {planned + 30}", f'value: "{planned}"', f'_TIME_S: "{planned}"']
        assert [w for w in wanted if w not in text] == []


def test_what_an_earlier_attempt_measured_wins(here: Path) -> None:
    run = here / "runs" / "grpo-tiny"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text('{"kind": "checkpoint", "step": 3, "seconds": 400.0}\n')
    result = json.loads(invoke(f"{DEMO} --for slurm --shared /s --json").stdout)
    assert result["grace_s"] > 600
    assert json.loads(invoke(f"{DEMO} --for slurm --shared /s --grace 90 --json").stdout)["grace_s"] == 90


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_what_is_told() -> None:
    said = invoke(f"{DEMO} --for kuberay --shared /work --claim c").stdout
    assert "1 × 4 CPUs, 16 GiB: the driver, 1 learner rank (head, stable)" in said
    assert "1 rollout worker (rollout, preemptible)" in said
    assert "grace      60 s between SIGTERM and the kill: a step 30 s, saving" in said
    assert "rlkd train configs/grpo-tiny.yaml ray.wait_s=1800\n           in /work" in said
    assert "wrote      rendered/grpo-tiny/kuberay/rayjob.yaml" in said


def test_options_reach_the_command(here: Path) -> None:
    invoke(f"{DEMO} 'model.system=It''s $HOME `x`' ray.wait_s=5 preempt.grace_s=7 --for slurm --shared /s")
    script = (here / "rendered/grpo-tiny/slurm/job.sbatch").read_text()
    (line,) = [line for line in script.splitlines() if " rlkd train " in line]
    words = shlex.split(line.removesuffix(" &"))
    assert words[words.index("rlkd") :] == [
        "rlkd", "train", DEMO, "model.system=Its $HOME `x`", "ray.wait_s=5", "preempt.grace_s=7",
    ]  # fmt: skip


def test_only_what_was_rendered_is_written_over(here: Path) -> None:
    assert invoke(f"{DEMO} --for docker --out o").exit_code == 0
    assert invoke(f"{DEMO} --for docker --out o seed=3").exit_code == 0
    (here / "o" / "run.sh").write_text("#!/bin/sh\nmine\n")
    dockerfile = (here / "o" / "Dockerfile").read_bytes()
    result = invoke(f"{DEMO} --for docker --out o seed=4")
    assert result.exit_code == 3
    assert "o/run.sh" in result.stderr
    assert (here / "o" / "run.sh").read_text() == "#!/bin/sh\nmine\n"
    assert (here / "o" / "Dockerfile").read_bytes() == dockerfile


@pytest.fixture
def _forgetful() -> Iterator[None]:
    before = dict(KNOWN._names), KNOWN._any
    yield
    KNOWN._names, KNOWN._any = before


@pytest.mark.usefixtures("_forgetful")
def test_no_secret_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789")
    said = refused(f"{DEMO} model.system=canary-0123456789 --for slurm --shared /s")
    assert "a secret on the command line would stand in the rendered files" in said
    assert "canary-0123456789" not in said
    assert not (here / "rendered").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kubray", "did you mean `kuberay`?"),
        ("Slurm", "did you mean `slurm`?"),
        ("k8s", "did you mean `kuberay`?"),
        ("nomad", "kuberay, slurm, docker, ray-up"),
    ],
)
def test_an_unknown_platform(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="C440") as refusal:
        platform(name)
    assert says in str(refusal.value)
    assert "no such platform" in refused(f"{DEMO} --for {name}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image", "a b"), ("image", "-x"), ("shared", "relative"), ("shared", "/a/../b"), ("claim", "UPPER"),
        ("secret", "a_b"), ("stable", ["noequals"]), ("preemptible", ["a b=c"]), ("preemptible", ["a=b:c"]),
        ("toleration", ["a=b"]), ("toleration", ["a=b:Never"]), ("toleration", ["=b:NoSchedule"]), ("time", "soon"),
        ("sbatch", ["partition=gpu"]), ("sbatch", ["--x\n#SBATCH --y"]), ("notice", 3), ("retries", -1),
    ],
)  # fmt: skip
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match="C443") as refusal:
        _settings({option: value}, gpu=False)
    assert f"--{option} " in str(refusal.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("option", ["--notice 3", "'model.system=a\nb'"])
def test_bad_options_end_the_command(option: str) -> None:
    assert "RLKD-C443" in refused(f"{DEMO} --for slurm --shared /s {option}")


def test_kuberay_needs_the_claim_of_the_shared_folder(here: Path) -> None:
    assert "--claim NAME" in refused(f"{DEMO} --for kuberay --shared /work")
    assert not (here / "rendered").exists()


def test_a_recipe_with_stages_gets_nodes_for_all(here: Path) -> None:
    found = json.loads(invoke("configs/grpo-then-kdrl-tiny.yaml --for kuberay --shared /s --claim c --json").stdout)
    assert found["nodes"] == 4  # the second stage has a teacher
    assert (here / "rendered/grpo-then-kdrl-tiny/kuberay/rayjob.yaml").is_file()


def test_labels_and_tolerations() -> None:
    assert labels("--stable", ["a.b/c=d", "e="]) == {"a.b/c": "d", "e": ""}
    first, second = tolerations(["a/b=true:NoSchedule", "c:NoExecute"])
    assert (first.key, first.value, first.effect) == ("a/b", "true", "NoSchedule")
    assert (second.key, second.value, second.effect) == ("c", None, "NoExecute")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True))
def test_every_runs_name_becomes_one_of_kubernetes(name: str) -> None:
    import re

    label = Job(name, "r.yaml", (), None, 60, False, "2.60.0", "x").label
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
    assert len(label) <= LONGEST


def test_settings_are_frozen_and_checked() -> None:
    assert Settings("registry.example:5000/team/rlkd@sha256:0123").retries == 20
