"""Learner ranks as Ray actors: they meet, train, publish, save, and a lost one is noticed."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
from torch import Tensor

from rlkd.core.errors import DivergedError, LearnerLost
from rlkd.core.ports import WeightRef
from rlkd.engines.deepspeed import Rank, RankOptions
from rlkd.engines.weights import read
from rlkd.workers.learner import LearnerGroup, spawner
from rlkd.workers.threads import environment
from tests.learner_help import tiny_folder
from tests.stack.learner_ranks import ALGORITHM, STEPS, Poisoned, batches, options, run, weights

pytestmark = pytest.mark.stack
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), hidden_size=64, head_dim=16, initializer_range=0.1)


def plain(made: RankOptions) -> dict[str, Any]:
    return asdict(made)


def make(folder: Path, scratch: Path, stage: int, algorithm: Any = ALGORITHM) -> tuple[LearnerGroup, list[WeightRef]]:
    delivered: list[WeightRef] = []

    async def deliver(ref: WeightRef) -> None:
        delivered.append(ref)

    env = {**environment(1), "PYTHONPATH": ROOT}
    spawn = spawner(2, str(scratch / "weights"), env, lambda _: {"num_cpus": 0.5})
    return LearnerGroup(2, spawn, plain(options(folder, stage)), algorithm, deliver), delivered


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - w).norm() / w.norm()) for n, w in expected.items())


def test_two_actors_train_publish_save_and_export(folder: Path, tmp_path: Path) -> None:
    """ZeRO-2 on two actors equals one process; what is published and saved is what was trained."""
    alone = Rank(ALGORITHM, options(folder, 0))
    expected = run(alone, range(STEPS))
    both, delivered = make(folder, tmp_path, 2)

    async def train() -> list[Any]:
        await both.start()
        found = [await both.update(batch, {}) for batch in batches(2)]
        await both.publish(STEPS)
        published = {name: t.clone() for name, t in read(delivered[0])}
        await both.save(str(tmp_path / "learner"))
        await both.export(str(tmp_path / "hf"))
        await both.update(batches(2)[0], {})
        await both.load(str(tmp_path / "learner"))
        await both.publish(STEPS + 1)
        again = {name: t.clone() for name, t in read(delivered[1])}
        await both.finish()
        assert off(published, weights(alone)) < 1e-5
        assert off(again, published) < 1e-6
        return found

    for found, one in zip(asyncio.run(train()), expected, strict=True):
        assert found["loss"] == pytest.approx(one.sums["loss"], rel=1e-4, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(one.maxima["grad_norm"], rel=1e-4)
        assert found["tokens"] == one.sums["tokens"]
    assert len(json.loads((tmp_path / "probe.json").read_text())["tokens"]) == 32
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert not list((tmp_path / "weights").iterdir()), "finish removes what was published"
    alone.close()


def test_a_rank_that_dies_is_lost_and_one_that_diverges_says_why(folder: Path, tmp_path: Path) -> None:
    first, _ = make(folder, tmp_path, 0)
    second, _ = make(folder, tmp_path, 0, Poisoned())

    async def dies() -> None:
        await first.start()
        pid = (await first._one(1, "place", 30.0))["pid"]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LearnerLost, match=r"learner-1\.update"):
            await first.update(batches(2)[0], {})
        with pytest.raises(LearnerLost, match="was stopped"):
            await first.publish(1)

    async def diverges() -> None:
        await second.start()
        with pytest.raises(DivergedError, match="RLKD-T140"):
            await second.update(batches(2)[0], {"poison": 1.0})

    asyncio.run(dies())
    asyncio.run(diverges())
