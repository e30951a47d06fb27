"""The lock holds exact versions of everything, and nothing that breaks a CPU installation."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements-cpu.lock").read_text().splitlines()


def name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_line_pins_one_version() -> None:
    assert [line for line in LOCK if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []


def test_no_cuda_builds_beside_a_cpu_torch() -> None:
    """torchvision and torchaudio wheels break `import transformers` there."""
    assert {name(line) for line in LOCK} & {"torchvision", "torchaudio", "torchcodec"} == set()
    assert not any(line.startswith("nvidia-") for line in LOCK)


def test_everything_that_pyproject_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {name(r) for r in [*project["dependencies"], *extras["cpu"], *extras["dev"]]}
    assert wanted - {name(line) for line in LOCK} == set()
