"""Real runs with secrets in the environment, in the recipe, in an endpoint's errors and in a reward's traceback: none
of them is in any file of the run, nor on the screen."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.fake_openai import KEY, FakeOpenAI, status
from tests.stack.test_teachers import WRONG, events, recipe, rlkd, tiny  # noqa: F401 - a fixture

pytestmark = [pytest.mark.stack, pytest.mark.faults("F65")]
HUB, IN_RECIPE = "hf_TESTSECRETofTheHub", "sk-TESTSECRETinTheRecipe"
SECRETS = (HUB, IN_RECIPE, KEY)
REWARD = """
def score(prompt, text, api_key="", fails=False):
    if fails:
        raise ValueError("the judge refused {hub} and " + api_key)
    return float(len(text) % 2)
"""


def shown(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, str]:
    """Everything the program wrote, by where."""
    files = [p for p in (folder / "runs").rglob("*") if p.is_file()]
    written = {str(p.relative_to(folder)): p.read_bytes().decode("utf-8", "replace") for p in files}
    return {"stdout": done.stdout, "stderr": done.stderr, **written}


def with_reward(path: Path, **options: object) -> None:
    (path.parent / "judge.py").write_text(REWARD.replace("{hub}", HUB))
    config = yaml.safe_load(path.read_text())
    config["rewards"] = {"judge.py:score": {"api_key": IN_RECIPE, **options}}
    path.write_text(yaml.safe_dump(config) + f"# the other account: password: {HUB}\n")


@pytest.mark.faults("F65")
def test_an_endpoint_that_repeats_secrets(tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    """A run that ends well, with wandb's files."""
    with FakeOpenAI(key=KEY).running() as server:
        server.usual = WRONG
        server.script = [WRONG, *(status(500, f"for {KEY}, or was it {HUB} or {IN_RECIPE}?") for _ in range(3))]
        endpoint = {"model": "large", "key_env": "BIG", "retries": 0, "timeout_s": 3.0, "at_once": 1, "url": server.url}
        path = recipe(tmp_path, tiny, teachers={"big": {"endpoint": endpoint, "writer": {"max_tokens": 30}}})
        with_reward(path)
        more = ("report.wandb=offline", "report.tensorboard=true", "schedule.steps=1")
        done = rlkd("train", str(path), *more, cwd=tmp_path, BIG=KEY, HF_TOKEN=HUB)
    assert done.returncode == 0, done.stderr[-3000:]
    written = shown(done, tmp_path)
    assert [where for where, text in written.items() if any(secret in text for secret in SECRETS)] == []
    assert any("<redacted:HF_TOKEN>" in text for _, text in events(tmp_path))  # what the endpoint said
    source = written["runs/t/config.source.yaml"]
    assert "api_key: <redacted:api_key>" in source
    assert "password: <redacted:" in source
    assert any(where.startswith("runs/t/wandb/") and "<redacted" in text for where, text in written.items())


@pytest.mark.faults("F65")
def test_a_reward_that_raises_with_secrets(tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    """A run that ends with an error."""
    path = recipe(tmp_path, tiny, algorithm={"name": "grpo", "rollout": {"samples": 4}})
    with_reward(path, fails=True)
    done = rlkd("train", str(path), cwd=tmp_path, HF_TOKEN=HUB)
    assert done.returncode == 4, done.stderr[-3000:]
    written = shown(done, tmp_path)
    assert [where for where, text in written.items() if any(secret in text for secret in SECRETS)] == []
    for where in ("stderr", "runs/t/attempts/0001/exit.json"):
        assert "the judge refused <redacted:HF_TOKEN> and <redacted:api_key>" in written[where]
