"""The files of `ray up`, as Ray itself reads and checks them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlkd import cli
from tests.render_help import CLUSTER, DEMO, place

FILES = sorted(CLUSTER.glob("*/ray-up/*.yaml"))


def prepared(text: str) -> dict[str, Any]:
    """What `ray up` makes of it, with its defaults, checked by Ray's validator and schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found: dict[str, Any] = prepare_config(yaml.safe_load(text))
    validate_config(found)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_ray_takes_it(file: Path) -> None:
    found = prepared(file.read_text())
    types = found["available_node_types"]
    head = types.pop("head")
    assert head["resources"]["stable"] == 1
    assert head["max_workers"] == 0
    assert found["max_workers"] == sum(t["max_workers"] for t in types.values())
    for name, kind in types.items():
        assert kind["min_workers"] == kind["max_workers"] > 0
        config = kind["node_config"]
        spot = "InstanceMarketOptions" in config or config.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot is (name != "learner")
        assert ("stable" in kind["resources"]) is (name == "learner")


def test_the_large_one_has_its_gpus() -> None:
    for cloud, machine in (("aws", "p5.48xlarge"), ("gcp", "a3-highgpu-8g")):
        types = prepared((CLUSTER / f"dapo-qwen2.5-32b/ray-up/{cloud}.yaml").read_text())["available_node_types"]
        assert {n: t["max_workers"] for n, t in types.items()} == {"head": 0, "learner": 8, "rollout": 8, "reward": 1}
        assert machine in str(types["learner"]["node_config"])
        assert types["rollout"]["resources"]["GPU"] == 8
        assert types["head"]["resources"]["CPU"] == 0  # the driver alone


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("max_workers: 2\n", "max_worker: 2\n", "'max_worker' was unexpected"),
        ("head_node_type: head", "head_node_type: boss", "must be one of `available_node_types`"),
        ('resources: {"CPU"', 'resource: {"CPU"', "resource"),
        ("max_workers: 2\n", "max_workers: 1\n", "smaller than the sum of `min_workers`"),
        ("pull_before_run: true", "pull_first: true", "'pull_first' was unexpected"),
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, says: str) -> None:
    text = (CLUSTER / "grpo-tiny/ray-up/aws.yaml").read_text()
    assert old in text
    with pytest.raises(Exception, match=says):
        prepared(text.replace(old, new, 1))


@pytest.mark.parametrize(("platform", "file"), [("ray-up", "aws.yaml"), ("kuberay --claim c", "raycluster.yaml")])
def test_the_printed_command_is_the_same_run(
    platform: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rlkd submit` takes relative paths from where it is called, which is not the shared folder."""
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = f"{DEMO} schedule.steps=9 report.directory=/s/here --for {platform} --shared /s --out made"
    result = CliRunner().invoke(cli.app, ["render", *words.split()])
    assert result.exit_code == 0, result.output
    (line,) = [x for x in Path("made", file).read_text().splitlines() if x.startswith("# rlkd submit")]
    assert line.startswith(f"# rlkd submit {DEMO} schedule.steps=9 report.directory=/s/here ray.wait_s=1800 ")
    assert " model.path=/s/models/tiny --ray http://" in line
