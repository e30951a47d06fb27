"""A cluster that asks for a token, joined by processes that were told nothing of it."""

import subprocess
import sys

import pytest

from tests.cluster.ray_head import TOKEN, environment, head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
JOIN = """
import sys
import ray
from rlkd.core.errors import PreflightError
from rlkd.workers import cluster
try:
    cluster.join("rlkd-x", sys.argv[1], 1 << 27)
except PreflightError as error:
    print(error)
else:
    print(ray.get(ray.remote(lambda: "a task ran").remote(), timeout=60))
"""


def joined(address: str, **more: str) -> str:
    """What a driver says: with `more`, and without RAY_AUTH_MODE."""
    env = environment(RAY_AUTH_TOKEN_PATH="/nowhere", **more)
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address], capture_output=True, text=True, env=env, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_with_the_token_it_works_and_without_it_says_so() -> None:
    """A cluster that asks for none, joined where a token lies in the home, is every other test of this machine."""
    with head(cpus=1) as ray:
        assert joined(ray.gcs, RAY_AUTH_TOKEN=TOKEN).strip() == "a task ran"
        said = joined(ray.gcs, RAY_AUTH_TOKEN="")
        assert "it asks for a token" in said
        assert "RAY_AUTH_TOKEN" in said
        assert "this is not it" in joined(ray.gcs, RAY_AUTH_TOKEN="another-than-the-clusters")
