"""What travels with a job: the recipe with its `defaults`, local inputs, own modules, and rlkd where it is no wheel.

A small folder of its own, not the current one as a whole. In it relative paths mean what they mean here; what is
outside the current folder, and every model, must be on the nodes: those paths are made absolute and looked for there.
"""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import yaml
from blake3 import blake3

import rlkd
from rlkd.config.load import Loaded
from rlkd.config.schema import Config, Source
from rlkd.config.stages import Stage
from rlkd.core.errors import PreflightError, Problem

LEFT_OUT = ("runs", ".git", ".venv", "venv", "__pycache__", "node_modules", ".*_cache", "*.pyc", "*.safetensors",
            "*.gguf", ".gitignore", ".rayignore")  # Ray would leave out what these two name  # fmt: skip
FILE_LIMIT = 20 * 2**20  # bytes; Ray keeps packages in the head node's memory
LIMIT = 100 * 2**20  # of all together
IN_FILES = ("jsonl", "parquet", "huggingface")  # kinds of data.*.kind whose path is a file or a folder
PROBE = "rlkd_probe.py"


@dataclass(frozen=True)
class Package:
    """`files`: name in the package → the file here, or its content."""

    files: Mapping[str, Path | bytes]
    recipe: str  # its name in the package
    overrides: tuple[str, ...]  # those of the command line, and paths made absolute
    on_nodes: Mapping[str, str] = field(default_factory=dict)  # key of the recipe → path that the nodes must have
    run_folder: str = ""  # absolute

    @property
    def size(self) -> int:
        return sum(map(_size, self.files.values()))

    @property
    def digest(self) -> str:
        """Of everything in it, and of the command."""
        total = blake3()
        for name, file in sorted(self.files.items()):
            content = file if isinstance(file, bytes) else file.read_bytes()
            total.update(f"{name}\0{len(content)}\0".encode()).update(content)
        return total.update("\0".join((self.recipe, *self.overrides)).encode()).hexdigest(8)

    def words(self) -> str:
        without = "runs/, .git/, models, *.safetensors"
        return f"package {size_words(self.size)} ({len(self.files)} files; left out {without})"

    def write(self, folder: Path) -> None:
        """Into an empty folder."""
        for name, file in self.files.items():
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                to.write_bytes(file)
            else:
                shutil.copyfile(file, to)


def packed(
    stages: Sequence[Stage], recipe: Path, overrides: Sequence[str], include: Sequence[str] = (),
    file_limit: int = FILE_LIMIT, limit: int = LIMIT,
) -> Package:  # fmt: skip
    """The package of a recipe that was loaded in the current folder. PreflightError: a file is missing or too large."""
    here = Path.cwd()
    files: dict[str, Path | bytes] = {}
    name = _add_recipe(files, recipe, here)
    more, on_nodes, problems = _paths(stages, here, files)
    problems += _included(include, here, files)
    for path in own_modules(here):
        files[str(path.relative_to(here))] = path
    files |= rlkd_itself()
    files[PROBE] = Path(__file__).with_name("probe.py")
    problems += too_large(files, file_limit, limit)
    if problems:
        raise PreflightError.of(problems)
    root = os.path.abspath(stages[0].config.report.directory)
    folder = os.path.join(root, stages[0].config.name)
    return Package(files, name, (*overrides, *more, f"report.directory={root}"), on_nodes, folder)


def _add_recipe(files: dict[str, Path | bytes], recipe: Path, here: Path) -> str:
    """The recipe and its `defaults`, side by side as they are; its name in the package."""
    every = [Path(os.path.abspath(path)) for path in recipe_files(recipe)]
    if all(path.is_relative_to(here) for path in every):
        names = {path: str(path.relative_to(here)) for path in every}
    else:
        top = Path(os.path.commonpath([path.parent for path in every]))
        names = {path: str("recipe" / path.relative_to(top)) for path in every}
    files |= {name: path for path, name in names.items()}
    return names[every[0]]


def recipe_files(recipe: Path) -> list[Path]:
    """It, and the files that `defaults` name, as config/recipe.py finds them. The recipe was loaded before."""
    said = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    names = said.get("defaults", []) if isinstance(said, dict) else []
    beside = [recipe.parent / (n if str(n).endswith((".yaml", ".yml")) else f"{n}.yaml") for n in map(str, names)]
    return [recipe, *(file for path in beside for file in recipe_files(path))]


def _paths(
    stages: Sequence[Stage], here: Path, files: dict[str, Path | bytes]
) -> tuple[list[str], dict[str, str], list[Problem]]:
    """Every path of the recipe: into `files`, or to be on the nodes; overrides for those, and what is missing here."""
    more: list[str] = []
    on_nodes: dict[str, str] = {}
    problems: list[Problem] = []
    for number, stage in enumerate(stages):
        written = stage.config.written.expressions if isinstance(stage.config, Loaded) else {}
        before = f"stages.{stage.name}." if stage.name else ""
        for key, value in {**inputs(stage.config), **models(stage.config)}.items():
            if key in written or (key == "model.path" and number):  # of the nodes' environment; of the stage before
                continue
            path = Path(value)
            outside = path.is_absolute() or value.startswith("~")
            if not outside and key in inputs(stage.config) and (here / path).resolve().is_relative_to(here.resolve()):
                problems += _add(files, here, path, f"{before}{key}")
                continue
            full = value if outside else os.path.abspath(value)
            on_nodes[before + key] = full
            if not outside:
                more.append(f"{before}{key}={full}")
    return more, on_nodes, problems


def inputs(config: Config) -> dict[str, str]:
    """Files that a run reads and that are small enough to travel, by key."""
    found: dict[str, str | None] = {"model.chat_template": config.model.chat_template}
    sources: dict[str, Source | None] = {"data.train": config.data.train, "data.holdout": config.data.holdout}
    for key, source in sources.items():
        if source is not None:
            found[f"{key}.path"] = source.path if source.kind in IN_FILES else None
            found[f"{key}.traces"] = source.traces
    return {key: value for key, value in found.items() if value}


def models(config: Config) -> dict[str, str]:
    """Folders and files that must be on the nodes, by key."""
    found: dict[str, str | None] = {"model.path": config.model.path, "reference.path": config.reference.path}
    found |= {f"teachers.{name}.path": t.path for name, t in config.teachers.items() if t.endpoint is None}
    files = {f"rewards.{name}": name.rpartition(":")[0] for name in config.rewards}
    found |= {key: path for key, path in files.items() if path.startswith(("/", "~"))}  # others travel: own_modules
    return {key: value for key, value in found.items() if value}


def _add(files: dict[str, Path | bytes], here: Path, path: Path, key: str) -> list[Problem]:
    """A file, or a folder without what is left out."""
    full = Path(os.path.abspath(here / path))
    if not full.exists():
        fix = "give its absolute path if it is on the nodes alone"
        return [Problem("RLKD-E235", f"{key}: there is no {path} here", str(full), fix)]
    for file in [full] if full.is_file() else below(full):
        files[str(file.relative_to(here))] = file
    return []


def _included(patterns: Iterable[str], here: Path, files: dict[str, Path | bytes]) -> list[Problem]:
    """Files and folders of `--include`."""
    problems: list[Problem] = []
    for pattern in patterns:
        found = [] if Path(pattern).is_absolute() else sorted(here.glob(pattern))
        if not found:
            fix = "a file, a folder, or a pattern such as `prompts/*.txt`, below the current folder"
            problems.append(Problem("RLKD-E235", f"--include {pattern}: nothing of that name here", str(here), fix))
        for path in found:
            problems += _add(files, here, path.relative_to(here), f"--include {pattern}")
    return problems


def below(folder: Path) -> list[Path]:
    """The files in it, without what is left out."""
    found = []
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not _left_out(n))
        found += [Path(above) / n for n in sorted(names) if not _left_out(n)]
    return found


def _left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def own_modules(here: Path) -> list[Path]:
    """Modules of the current folder that the recipe had imported: rewards, algorithms, and what they import. Of a
    package every module, for some are imported late."""
    found: set[Path] = set()
    for module in list(sys.modules.values()):
        path = _file_of(module)
        if path is None or not path.is_relative_to(here) or any(_left_out(p) for p in path.relative_to(here).parts):
            continue
        if path.is_relative_to(_package_of(rlkd)) or "site-packages" in path.parts:
            continue
        top = path.relative_to(here).parts[0]
        in_package = (here / top / "__init__.py").is_file()
        found |= {p for p in below(here / top) if p.suffix == ".py"} if in_package else {path}
    return sorted(found)


def _file_of(module: object) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name) if isinstance(name, str) and name.endswith(".py") else None


def _package_of(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__).parent


def rlkd_itself() -> dict[str, Path | bytes]:
    """rlkd's own files where it is a checkout, with a note of its version; nothing where it was installed as a wheel,
    which the nodes must then have too."""
    folder = _package_of(rlkd)
    if "site-packages" in folder.parts or "dist-packages" in folder.parts:
        return {}
    version = importlib.metadata.version("rlkd")
    note = f"Metadata-Version: 2.1\nName: rlkd\nVersion: {version}\n"
    files: dict[str, Path | bytes] = {f"rlkd-{version}.dist-info/METADATA": note.encode()}
    return files | {f"rlkd/{path.relative_to(folder)}": path for path in below(folder)}


def too_large(files: Mapping[str, Path | bytes], file_limit: int, limit: int) -> list[Problem]:
    """Every file over the limit by name; or the largest ones, where it is all of them together."""
    sizes = {name: _size(file) for name, file in files.items()}
    fix = (
        "data: put it on a path that every node has, and give that path; models: model.path on the nodes; "
        "checkpoints: checkpoint.remote; or --limit-mb, if {size} shall travel with every attempt"
    )
    over = [
        Problem(
            "RLKD-E234",
            f"{name} is {size_words(size)}, and a file of the package may have {size_words(file_limit)}",
            str(files[name]),
            fix.format(size=size_words(size)),
        )
        for name, size in sizes.items()
        if size > file_limit
    ]
    total = sum(sizes.values())
    if over or total <= limit:
        return over
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    named = ", ".join(f"{name} ({size_words(sizes[name])})" for name in largest)
    what = f"the package has {size_words(total)} in {len(files)} files, and may have {size_words(limit)}: {named}"
    return [Problem("RLKD-E234", what, str(Path.cwd()), fix.format(size=size_words(total)))]


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def size_words(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
