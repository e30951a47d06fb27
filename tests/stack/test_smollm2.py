"""A real language model: learner and vLLM agree on the log-probs of the same tokens, also after weight updates."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rlkd.algorithms.grpo import GRPO
from rlkd.config.load import load
from rlkd.core.batch import pack
from rlkd.core.errors import PreflightError
from rlkd.core.types import Group
from rlkd.fleet import Fleet
from rlkd.inputs import read
from rlkd.models.get import get
from rlkd.workers.rollout import ENGINES

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between sessions where RLKD_TEST_MODELS names a directory."""
    kept = os.environ.get("RLKD_TEST_MODELS")
    folder = Path(kept) / "smollm2" if kept else tmp_path_factory.mktemp("models") / "smollm2"
    return get("smollm2", folder)


@pytest.fixture(autouse=True)
def no_ray_left() -> Iterator[None]:
    yield
    ray.shutdown()


def recipe(folder: Path, model: Path) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{path: {model}}}\n"
        "data:\n  train: {kind: reasoning_gym, path: chain_sum, size: 16}\n"
        "algorithm: {name: grpo, rollout: {samples: 4}}\n"
        "rewards: {reasoning_gym: {}}\n"
        "schedule: {steps: 6, groups_per_step: 2}\n"
        "sampler: {max_tokens: 16, kv_cache_gib: 0.5}\n"
        "learner: {lr: 1.0e-5}\n"
        "evaluate: {at_start: false, at_end: false}\n"
        "ray: {wait_s: 60}\n"
    )
    return load(path)


async def differences(config: Any, folder: Path) -> list[tuple[float, float]]:
    """(mean, max) of |log π − log μ| before the first and after each of five optimizer steps with weight updates."""
    inputs = read(config)
    found = []
    async with Fleet.start(config, inputs, folder, lambda *_, **__: None) as fleet:
        algorithm = config.algorithm
        for step in range(6):
            await fleet.learner.publish(step)
            prompts = [replace(p, seed=100 * step + i) for i, p in enumerate(inputs.data.train.prompts[:2])]
            groups = await asyncio.gather(*(algorithm.rollout(p, fleet.services, {}) for p in prompts))
            assert all(s.versions == (step, step) for g in groups for s in g.samples)
            batch = pack([credited(algorithm, g) for g in groups], 1, 4096)
            metrics = await fleet.learner.update(batch, {})
            found.append((metrics["mismatch/mean"], metrics["mismatch/max"]))
    return found


def credited(algorithm: GRPO, group: Group) -> Group:
    """Rewards that differ, whatever was written, so that every step moves the weights."""
    samples = tuple(replace(s, reward=float(i % 2)) for i, s in enumerate(group.samples))
    return algorithm.credit(replace(group, samples=samples))


def test_learner_and_vllm_agree_before_and_after_five_updates(tmp_path: Path, smollm2: Path) -> None:
    found = asyncio.run(differences(recipe(tmp_path, smollm2), tmp_path))
    assert len(found) == 6
    assert max(mean for mean, _ in found) <= 1e-4, found
    assert max(worst for _, worst in found) <= 1e-3, found


@pytest.mark.long
def test_a_stale_head_would_be_caught(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: leave out the refresh of the tied LM head, and the same check fails."""
    monkeypatch.setitem(ENGINES, "vllm", "tests.stale_engine:StaleHead")
    found = asyncio.run(differences(recipe(tmp_path, smollm2), tmp_path))
    assert found[0][1] <= 1e-3
    assert max(worst for _, worst in found[1:]) > 1e-3, found


def test_no_gpu_where_one_is_asked_for(tmp_path: Path, smollm2: Path) -> None:
    config = recipe(tmp_path, smollm2)
    config = replace(config, model=replace(config.model, device="cuda"))

    async def start() -> None:
        async with Fleet.start(config, read(config), tmp_path, lambda *_, **__: None):
            raise AssertionError("it must not start")

    with pytest.raises(PreflightError, match="no node of the cluster has a GPU"):
        asyncio.run(start())
