"""The dependency rule of architecture.md §4.2, over every import of every file, nested ones too."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rlkd

ROOT = Path(rlkd.__file__).parent
EVERYTHING = {"*"}
BY_PATH = {"workers": "engines"}  # importlib.import_module("rlkd.engines.…") in a function: inside the actor

# layer -> what of rlkd it may import, beside itself. A name with a dot is one module only.
MAY_IMPORT = {
    "core": set(),
    "rollout": {"core"},
    "guidance": {"core"},
    "rewards": {"core", "models"},
    "curriculum": {"core"},
    "data": {"core", "models"},
    "models": {"core"},
    "algorithms": {"core", "rollout", "guidance"},
    "engines": {"core"},
    "workers": {"core"},
    "store": {"core"},
    "train": {"core", "store"},
    "report": {"core"},
    "config": {"core", "algorithms", "rewards", "train.loop"},
    "doctor": {"core"},
    "plan": {"core", "config", "rollout.traced"},
    "render": {"core", "config"},
    "sweep": EVERYTHING,  # a trial is a whole run
    "submit": {"core", "config", "plan", "workers", "report", "teachers", "cli"},
    "root": EVERYTHING,  # the files beside the folders: cli, run and their helpers
}
# heavy library -> the layers that may import it
HEAVY = {
    "ray": {"workers", "root", "submit", "sweep"},
    "vllm": {"engines"},
    "deepspeed": {"engines"},
    "omegaconf": {"config"},
    "typer": {"root"},
}
CORE_MAY_IMPORT = {"numpy", "torch", "jaxtyping"}


@dataclass(frozen=True)
class Imported:
    name: str  # rlkd.core.types.Group
    late: bool = False  # by importlib.import_module("…") in a function


def imports(source: str, package: str) -> Iterator[Imported]:
    """Everything that a module of `package` imports: by statements anywhere, and by import_module with a constant."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Imported(f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Imported(node.args[0].value, late=id(node) in inside)


def violations(source: str, module: str, package: str) -> list[str]:
    """What a module must not import. `module` is its name below rlkd: `train.loop`; `package` its folder: rlkd.train.

    A file directly in rlkd/ is of the layer "root", which no other may import.
    """
    layer = module.split(".")[0] if package != "rlkd" else "root"
    found, heavy = [], set()
    for imported in imports(source, package):
        top, _, inner = imported.name.partition(".")
        wrong = False
        if top == "rlkd" and inner:
            wrong = not fits(inner, layer, imported.late)
        elif layer == "core":
            wrong = top not in CORE_MAY_IMPORT | sys.stdlib_module_names
        elif top in HEAVY:
            heavy.add(top)
            wrong = layer not in HEAVY[top]
        if wrong:
            found.append(f"{module} imports {imported.name}")
    if layer == "engines" and len(heavy) > 1:
        found.append(f"{module} imports more than one heavy library: {', '.join(sorted(heavy))}")
    return found


def fits(inner: str, layer: str, late: bool) -> bool:
    """Whether a layer may import `inner`, the name below rlkd."""
    allowed = {layer, *MAY_IMPORT[layer], *([BY_PATH[layer]] if late and layer in BY_PATH else [])}
    return "*" in allowed or any(inner == a or inner.startswith(f"{a}.") for a in allowed)


def modules() -> list[tuple[Path, str, str]]:
    """Every file of rlkd: its path, its name below rlkd, its package."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        inside = parts[:-1]
        name = ".".join(inside if parts[-1] == "__init__" else parts)
        if name:
            found.append((path, name, ".".join(["rlkd", *inside])))
    return found


def test_every_layer_is_in_the_table() -> None:
    folders = {name.split(".")[0] for _, name, package in modules() if package != "rlkd"}
    assert folders == MAY_IMPORT.keys() - {"root"}
    assert len(modules()) > 40


@pytest.mark.parametrize(("path", "name", "package"), modules(), ids=[name for _, name, _ in modules()])
def test_imports(path: Path, name: str, package: str) -> None:
    assert violations(path.read_text(encoding="utf-8"), name, package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.x", "import ray"),
        ("core.x", "import transformers"),
        ("core.x", "from rlkd.train import loop"),
        ("train.x", "import rlkd.workers.reward"),
        ("train.x", "def f():\n    from rlkd.engines.vllm import Engine"),
        ("train.x", "from ..workers import reward"),
        ("train.x", "from .. import workers"),
        ("train.x", "from rlkd import algorithms"),
        ("rewards.x", "async def f():\n    if True:\n        import ray.util"),
        ("rewards.x", "from rlkd import data"),
        ("workers.x", "from rlkd.engines import vllm"),
        ("workers.x", "importlib.import_module('rlkd.engines.vllm')"),
        ("workers.x", "def f():\n    import rlkd.engines.vllm"),
        ("train.x", "def f():\n    return importlib.import_module('rlkd.engines.vllm')"),
        ("workers.x", "import vllm"),
        ("engines.x", "import ray"),
        ("engines.x", "import vllm\nimport deepspeed"),
        ("report.x", "from rlkd.config.schema import Config"),
        ("config.x", "from rlkd.train.buffer import Buffer"),
        ("config.x", "from rlkd.engines import jail"),
        ("train.x", "from rlkd import run"),
        ("data.x", "import rlkd.cli"),
        ("cli", "import vllm"),
    ],
)
def test_what_is_forbidden_is_found(module: str, source: str) -> None:
    package = ".".join(["rlkd", *module.split(".")[:-1]])
    assert len(violations(source, module, package)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.x", "import torch, dataclasses\nfrom rlkd.core.types import Group"),
        ("rewards.x", "from rlkd.models.arithmetic import score"),
        ("workers.x", "ENGINE = 'rlkd.engines.vllm:Engine'\nimport ray"),
        ("config.x", "from rlkd.train.loop import Schedule"),
        ("workers.x", "def f():\n    return importlib.import_module('rlkd.engines.vllm')"),
        ("engines.x", "import vllm\nimport torch\nfrom . import jail"),
        ("run", "from rlkd.workers import reward\nimport ray"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    package = ".".join(["rlkd", *module.split(".")[:-1]])
    assert violations(source, module, package) == []
